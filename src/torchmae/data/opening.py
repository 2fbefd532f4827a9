"""From the settings to loaders: splits, what is held in memory, mean and deviation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from torchmae.config import DataConfig
from torchmae.data.arrays import DoesNotFitError, Held, hold
from torchmae.data.formats import Context, Progress
from torchmae.data.labels import in_training_classes
from torchmae.data.layouts import open_splits
from torchmae.data.loader import ImageLoader, hold_out
from torchmae.data.reading import FEW, SAMPLE, BadFiles, Measured, Probe, fit_channels, measure, probe, reader_processes
from torchmae.data.sources import Source, Subset, all_notes, spread
from torchmae.data.transforms import Normalisation
from torchmae.data.worker import View
from torchmae.errors import ConfigError, DataError

_GIB = 2**30
_COMPARED = 64  # held-out images that are looked for among the training images
_NAMESAKES = 4  # training images that each is compared with
_DEVICE_SHARE = 0.1  # of a GPU's free memory that images may take unasked: the model is not there yet


@dataclass(frozen=True)
class Data:
    """An opened data set.

    Attributes:
        train: training images.
        val: held-out images; None: there are none.
        channels: of every image.
        normalisation: how stored values become the model's input.
        classes: the name of each label, where known.
        fingerprint: of the training images: changes when they do.
        notes: what was assumed, decided or left out, a short phrase each.
        bad: the images that could not be read so far, of both sets.
    """

    train: ImageLoader
    val: ImageLoader | None
    channels: int
    normalisation: Normalisation
    classes: tuple[str, ...] | None
    fingerprint: str
    notes: tuple[str, ...]
    bad: BadFiles


def open_data(
    config: DataConfig,
    *,
    input_size: tuple[int, ...],
    channels: int | None,
    device: torch.device,
    progress: Progress | None = None,
) -> Data:
    """Opens the data of a run: finds splits, holds what fits in memory, measures mean and deviation.

    Args:
        config: what to open and how.
        input_size: spatial size of the model's input; images of any other size are resampled to it.
        channels: that the model takes; None: what the data has.
        device: where batches go.
        progress: told how far reading and measuring are.

    Raises:
        ConfigError: settings that do not fit the data.
        DataError: data that is missing, empty or unreadable.
    """
    context = Context.of(config, spatial_dims=len(input_size), progress=progress)
    splits = open_splits(config.source, context)
    train, val, apart = choose_splits(config, splits, context)
    seen = _checked_probe(train, input_size)
    channels = seen.channels if channels is None else channels
    train = fit_channels(train, seen, channels)
    val_seen = None if val is None else _checked_probe(val, input_size)
    val = None if val is None or val_seen is None else fit_channels(val, val_seen, channels)
    bad = BadFiles(len(train) + (0 if val is None else len(val)), config.max_bad)
    limit = config.memory_limit * _GIB
    held = _hold(train, config, limit, seen, bad, progress)
    shared = held is not None and val is not None and _holds(held, val)  # parts of one array are held once
    val_limit = limit if held is None or shared else limit - held.nbytes
    val_held = None if val is None or val_seen is None else _hold(val, config, val_limit, val_seen, bad, progress)
    measured = _measure(config, train if held is None else held.source(), seen, channels, progress)
    placed = None if held is None else _on_device(held, config, device)
    if val_held is not None:
        if placed is not None and shared:
            val_held = replace(val_held, images=placed.images)
        else:
            val_held = _on_device(val_held, config, device)
    view = View(input_size, config.crop_scale, config.crop_ratio, config.flip)

    def loader(source: Source, in_memory: Held | None) -> ImageLoader:
        return ImageLoader(
            source,
            in_memory,
            view=view,
            normalisation=measured.normalisation,
            device=device,
            num_workers=reader_processes(config.num_workers),
            bad=bad,
            repeats=config.repeats,
        )

    return Data(
        train=loader(train, placed),
        val=None if val is None else loader(val, val_held),
        channels=channels,
        normalisation=measured.normalisation,
        classes=train.classes,
        fingerprint=train.fingerprint(),
        notes=tuple(dict.fromkeys([*all_notes(splits), *apart, *seen.notes, *measured.notes])),
        bad=bad,
    )


def choose_splits(
    config: DataConfig, splits: dict[str, Source], context: Context
) -> tuple[Source, Source | None, tuple[str, ...]]:
    """The training images, the held-out ones that `config.val` asks for, and what there is to say about those.

    "auto" never takes a test split: where there is no "val", some of the training images are held out.
    """
    train = splits["train"]
    if config.val == "none":
        return train, None, ()
    if config.val == "auto" and "val" not in splits:
        kept, held_out = hold_out(len(train), config.val_size)
        if not len(held_out):
            return train, None, ()
        rest = Subset(train, kept)
        return (rest, *in_training_classes(Subset(train, held_out), rest, "held-out"))
    name = "val" if config.val == "auto" else config.val
    if name == "train":
        raise ConfigError("data.val is 'train'", "hold out other images than those trained on: auto or a path")
    if name in splits:
        return (train, *in_training_classes(splits[name], train, name))
    try:
        val = open_splits(config.val, context)["train"]
    except DataError as error:
        others = [split for split in splits if split != "train"]
        raise ConfigError(
            f"data.val {config.val!r} cannot be used: {error.problem}",
            f"choose from auto, none, {', '.join([*others, 'or a path'])}",
        ) from error
    apart = check_apart(val, train, f"data.val {config.val!r}", "auto (some are held out) or another path")
    val, lost = in_training_classes(val, train, "val")
    return train, val, (*apart, *lost)


def check_apart(test: Source, train: Source, what: str, fix: str) -> tuple[str, ...]:
    """A note where some held-out images are training images too; ConfigError where all are.

    Args:
        test: the held-out images.
        train: the training images.
        what: names the held-out images in the message.
        fix: what to choose instead.
    """
    share = training_share(test, train)
    if share == 1:
        raise ConfigError(f"{what} leads to the training images", f"choose {fix}")
    return (f"about {share:.0%} of the images of {what} are training images too: figures flatter",) if share else ()


def training_share(test: Source, train: Source) -> float:
    """Share of held-out images that are training images too, as far as 64 of them show.

    A training image is the same one when it has the same file name (or number in an array) and the same pixels,
    wherever it lies: a link, a second path or a copy of the data set is found.
    """
    looked_for = [(int(i), test.name(int(i)).split("/")) for i in spread(len(test), _COMPARED)]
    namesakes: dict[str, list[int]] = {parts[-1]: [] for _, parts in looked_for}
    for i in range(len(train)):
        last = train.name(i).rpartition("/")[2]
        if last in namesakes:
            namesakes[last].append(i)
    found = 0
    for index, parts in looked_for:
        alike = sorted(namesakes[parts[-1]], key=lambda i: -_common_end(parts, train.name(i).split("/")))
        found += any(_same(test, index, train, i) for i in alike[:_NAMESAKES])
    return found / len(looked_for)


def _common_end(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count


def _same(one: Source, i: int, other: Source, j: int) -> bool:
    try:
        return np.array_equal(one.read(i), other.read(j))
    except DataError:
        return False


def _checked_probe(source: Source, input_size: tuple[int, ...]) -> Probe:
    """`probe`; ConfigError when the images have not as many spatial dimensions as the model's input."""
    seen = probe(source)
    for size in seen.sizes:
        if len(size) != len(input_size):
            raise ConfigError(
                f"model.input_size has {len(input_size)} numbers and {source.name(0)} has {len(size)} dimensions",
                f"set model.input_size to {len(size)} numbers",
            )
    return seen


def _hold(
    source: Source, config: DataConfig, limit: float, seen: Probe, bad: BadFiles, progress: Progress | None
) -> Held | None:
    """The images in memory, as far as `config.cache` wants them there and they fit."""
    if config.cache == "none" or (config.cache == "auto" and len(seen.sizes) > 1):
        return None
    try:
        return hold(source, limit if config.cache == "auto" else float("inf"), bad, progress)
    except DoesNotFitError as error:
        if config.cache == "auto":
            return None
        raise ConfigError(f"data.cache is {config.cache!r}, but {error}", "set data.cache to auto or none") from error


def _holds(held: Held, source: Source) -> bool:
    """Whether the images of a source are part of an array that is held as it is."""
    whole = source.whole()
    return whole is not None and whole[0].ctypes.data == held.images.data_ptr()


def _on_device(held: Held, config: DataConfig, device: torch.device) -> Held:
    """The same images in the device's own memory, where `config.cache` asks for that or it costs little of it."""
    if config.cache == "auto":
        wanted = device.type == "cuda" and held.nbytes <= torch.cuda.mem_get_info(device)[0] * _DEVICE_SHARE
    else:
        wanted = config.cache == "device"
    if not wanted:
        return held
    try:
        return replace(held, images=held.images.to(device))
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"data.cache is {config.cache!r}, but the images take {held.nbytes / _GIB:.1f} GiB, more than {device} has",
            "set data.cache to memory",
        ) from None


def _measure(config: DataConfig, train: Source, seen: Probe, channels: int, progress: Progress | None) -> Measured:
    """Mean, deviation and range of the training images; those that the settings give count."""
    for name, values in (("mean", config.mean), ("std", config.std)):
        if values is not None and len(values) != channels:
            raise ConfigError(
                f"data.{name} has {len(values)} numbers and the images {channels} channels",
                f"give {channels}, or leave data.mean and data.std out",
            )
    sample = SAMPLE if config.mean is None else FEW
    measured = measure(train, scale=config.scale, kinds=seen.kinds, sample=sample, progress=progress)
    if config.mean is None or config.std is None:
        return measured
    return measured._replace(normalisation=replace(measured.normalisation, mean=config.mean, std=config.std))
