"""From the settings to loaders: splits, what is held in memory, mean and deviation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from torchmae.config import DataConfig
from torchmae.config.data import DataOptions
from torchmae.data.apart import Apart, check_apart
from torchmae.data.arrays import DoesNotFitError, Held, hold
from torchmae.data.items import Context, Item, Progress, tracked
from torchmae.data.layouts import open_splits
from torchmae.data.loader import ImageLoader, View, hold_out
from torchmae.data.reading import (
    FEW,
    SAMPLE,
    BadFiles,
    Measured,
    Probe,
    map_samples,
    measure,
    median_size,
    probe,
    reader_processes,
)
from torchmae.data.sources import Source, Subset, Windows, all_notes, in_training_classes
from torchmae.data.transforms import Boxes, Normalisation, eval_box, window_boxes
from torchmae.errors import ConfigError, DataError
from torchmae.machine import GIB, bytes_to_keep, memory

HELD_OUT = "held-out"  # some of the training images
_SCENE, _FEW_SCENES = 1000, 64  # pixels of each side; fewer 8-bit pictures of this size are cut into windows
_DEVICE_SHARE = 0.1  # of a GPU's free memory that images may take unasked: the model is not there yet


@dataclass(frozen=True)
class Data:
    """An opened data set."""

    train: ImageLoader
    val: ImageLoader | None  # held-out images, where there are any
    channels: int
    normalisation: Normalisation
    window: tuple[int, ...] | None  # size of the windows that images are cut into; None: crops of whole images
    classes: tuple[str, ...] | None  # the name of each label, where known
    fingerprint: str  # of the training images: changes when they do
    notes: tuple[str, ...]  # what was assumed, decided or left out, a short phrase each
    bad: BadFiles  # the images of both sets that could not be read so far
    example: Item  # a training image, for what its file says of all


def open_data(
    config: DataConfig,
    *,
    input_size: tuple[int, ...],
    channels: int | None,
    device: torch.device,
    progress: Progress | None = None,
    own: Mapping[str, Source] | None = None,
) -> Data:
    """Opens the data of a run: finds splits, holds what fits in memory, measures mean and deviation.

    Images of any size are resampled to `input_size`. Without `channels`, the data says how many there are. `own` are
    splits of the caller's, in place of `config.source`. ConfigError: settings that do not fit the data. DataError: data
    that is missing, empty or unreadable.
    """
    context = Context.of(config, spatial_dims=len(input_size), progress=progress)
    splits = open_splits(config.source, context) if own is None else dict(own)
    train, val, apart = choose_splits(config, splits, context)
    fitted = fit_to_model([train] if val is None else [train, val], input_size, channels)
    fingerprint = fitted.sources[0].fingerprint()
    bad = BadFiles(sum(map(len, fitted.sources)), config.max_bad)
    window = window_size(config, fitted.probes[0], input_size, len(train))
    if window is not None and val is not None:
        fitted.sources[1] = grid_of_windows(fitted.sources[1], window, progress)
    held = _hold(fitted, config, bad, progress)
    measurable = fitted.sources[0] if held[0] is None or held[0].valid is not None else held[0].source()
    view = View(input_size, *config.augmentation(len(input_size), fitted.probes[0].example.form))
    views, windows = [view, view], []
    if window is not None:
        views[0] = replace(view, window=window)
        views[1] = views[0] if 0 in window else view  # of held-out clips, the frames are cropped
        sizes, boxes = _sizes_and_windows(fitted.sources[0], window, progress)
        measurable = Windows(measurable, sizes, boxes)
        rows = np.repeat(np.arange(len(sizes)), -(-sizes.prod(axis=1) // boxes[..., 1].prod(axis=1)))
        fitted.sources[0] = Subset(fitted.sources[0], rows)
        held[0] = None if held[0] is None else held[0].repeated(rows)
        sides = sides_of(window)
        each = f"{len(fitted.sources[0]):,} of {len(train):,} images an epoch"
        windows = [f"windows of {sides} at their own resolution, {each}: --data.window none for crops of whole images"]
    measured = _measure(config, fitted, measurable, progress)
    loaders = [
        ImageLoader(
            source,
            in_memory,
            view=each_view,
            normalisation=measured.normalisation,
            device=device,
            num_workers=reader_processes(config.num_workers),
            bad=bad,
            repeats=config.repeats,
        )
        for source, in_memory, each_view in zip(fitted.sources, _on_device(held, config, device), views, strict=False)
    ]
    return Data(
        train=loaders[0],
        val=None if val is None else loaders[1],
        channels=fitted.channels,
        normalisation=measured.normalisation,
        window=window,
        classes=train.classes,
        fingerprint=fingerprint,
        notes=tuple(
            dict.fromkeys([*all_notes(splits.values()), *apart, *fitted.probes[0].notes, *windows, *measured.notes])
        ),
        bad=bad,
        example=fitted.probes[0].example,
    )


def choose_splits(
    config: DataConfig, splits: dict[str, Source], context: Context
) -> tuple[Source, Source | None, tuple[str, ...]]:
    """The training images, the held-out ones that `config.val` asks for ("auto": never a test split), and notes."""
    train = splits["train"]
    name = ("val" if "val" in splits else HELD_OUT) if config.val == "auto" else config.val
    too_few = config.val == "auto" and name == HELD_OUT and not len(hold_out(train, config.val_size)[1])
    if name == "none" or too_few:
        return train, None, ()
    train, val, apart = held_out_images(splits, name, config.val_size, context, "data.val")
    val, lost = in_training_classes(val, train, name if name in (HELD_OUT, *splits) else "val")
    return train, val, (*apart.notes, *lost)


def held_out_images(
    splits: dict[str, Source],
    name: str,
    val_size: int,
    context: Context,
    option: str,
    order: Sequence[str] = ("train",),
) -> tuple[Source, Source, Apart]:
    """Training and held-out images, and what they have in common.

    `name`, the value of `option`, is HELD_OUT (`val_size` of the training images), a split, or a path or name of other
    data, of which the first split in `order` counts. ConfigError: a name that cannot be used, or that leads to the
    training images. DataError: too few images to hold some out.
    """
    train = splits["train"]
    if name == "train":
        raise ConfigError(f"{option} is 'train'", f"choose images that are not trained on: {HELD_OUT} or a path")
    if name in splits:
        fix = f"--{option.replace('_', '-')} {HELD_OUT}, or other images"
        apart = check_apart(splits[name], train, f"the {name} split", fix, progress=context.progress)
        return train, splits[name], apart
    if name == HELD_OUT:
        kept, held_out = hold_out(train, val_size)
        if not len(held_out):
            of_groups = "" if train.groups is None else f" of {len(np.unique(train.groups))} groups"
            problem = f"{len(train)} training images{of_groups} are too few to hold some out"
            raise DataError(problem, f"give {option} a path")
        rest, taken = Subset(train, kept), Subset(train, held_out)
        return rest, taken, check_apart(taken, rest, HELD_OUT, progress=context.progress)
    try:
        others = open_splits(name, context)
    except DataError as error:
        known = ", ".join([*(split for split in splits if split != "train"), HELD_OUT, "or a path"])
        raise ConfigError(f"{option} {name!r} cannot be used: {error.problem}", f"choose from {known}") from error
    images = next(others[split] for split in order if split in others)
    fix = f"{HELD_OUT} or another path"
    return train, images, check_apart(images, train, f"{option} {name!r}", fix, progress=context.progress)


class Fitted(NamedTuple):
    """Sources that were checked against a model and give as many channels as it takes."""

    sources: list[Source]
    probes: list[Probe]  # what samples of each look like
    channels: int


def fit_to_model(sources: Sequence[Source], input_size: tuple[int, ...], channels: int | None) -> Fitted:
    """Looks at samples of sources, training images first, and gives them `channels`; None: what most have.

    ConfigError: other numbers of axes or channels than the model takes. DataError: none of the samples can be read.
    """
    probes = [probe(source) for source in sources]
    channels = probes[0].channels if channels is None else channels
    for source, seen in zip(sources, probes, strict=True):
        if odd := next((size for size in seen.sizes if len(size) != len(input_size)), None):
            problem = f"{source.name(0)} has {len(odd)} dimensions and model.input_size has {len(input_size)} numbers"
            fix = f"give images with {len(input_size)}, or train with {len(odd)} numbers in model.input_size"
            raise ConfigError(problem, fix)
        if channels != seen.channels and {channels, seen.channels} != {1, 3}:
            problem = f"the images have {seen.channels} channels ({source.name(0)}) and the model takes {channels}"
            raise ConfigError(problem, f"give images with {channels}, or train with model.in_chans {seen.channels}")
    return Fitted([source.with_channels(channels) for source in sources], probes, channels)


def window_size(
    options: DataOptions, seen: Probe, input_size: tuple[int, ...], count: int | None = None
) -> tuple[int, ...] | None:
    """The size of the windows that images like those seen are cut into, by `options.window` and `clip`.

    `count` is the number of training images; None: not few.
    None: they are not cut. 0: not along this axis. ConfigError: another number of axes than the model takes.
    """
    asked = options.window
    if options.clip is not None:
        if len(input_size) == 2:
            problem = "data.clip is given, and model.input_size has two numbers, of which none is time"
            raise ConfigError(problem, "leave it out, or give signals one number and videos three")
        length = options.clip if isinstance(options.clip, int) else options.clip[0]
        given = (asked,) * len(input_size) if isinstance(asked, int) else asked
        rest = given[1:] if isinstance(given, tuple) else (0,) * (len(input_size) - 1)
        asked = (length, *rest)
    if asked == "none":
        return None
    if asked == "auto":
        mostly = seen.kinds.most_common(1)[0][0]
        is_picture = len(input_size) == 2 and mostly == "uint8" and seen.channels in (1, 3)
        size = median_size(seen.sizes)
        few_scenes = count is not None and count < _FEW_SCENES and min(size) >= _SCENE
        large = (np.array(size) > 2 * np.array(input_size)).any()
        return input_size if large and (few_scenes or not is_picture) else None
    window = (asked,) * len(input_size) if isinstance(asked, int) else tuple(map(int, asked))
    if len(window) != len(input_size):
        problem = f"data.window has {len(window)} numbers and model.input_size {len(input_size)}"
        raise ConfigError(problem, "give one for each axis, or one for all")
    return window


def sides_of(window: tuple[int, ...]) -> str:
    """The size of a window, for people."""
    return "x".join(str(length or "all") for length in window)


def _sizes_and_windows(
    source: Source, window: tuple[int, ...], progress: Progress | None
) -> tuple[npt.NDArray[np.int64], Boxes]:
    """(N, n) the size of each image, the window's where it cannot be opened, and (N, n, 2) a window of each."""
    sizes = _sizes(source, window, progress)
    return sizes, window_boxes(np.zeros((len(source), len(window))), sizes, window)


def _sizes(source: Source, missing: tuple[int, ...], progress: Progress | None) -> npt.NDArray[np.int64]:
    def size_of(index: int) -> tuple[int, ...]:
        with suppress(DataError):  # which says so again when it is read
            return source.open(index).size
        return missing

    found = map_samples(source, np.arange(len(source)), size_of)
    return np.array([*tracked(found, progress, "looking at sizes", len(source))])


def grid_of_windows(source: Source, window: tuple[int, ...], progress: Progress | None) -> Windows:
    """The windows of a source's images, in an even grid over each, as samples."""
    return Windows(source, *_sizes_and_windows(source, window, progress))


def covering_windows(
    source: Source, input_size: tuple[int, ...], window: tuple[int, ...] | None, progress: Progress | None
) -> Windows:
    """Windows that cover each image in an even grid, as samples.

    They have the size `window`. Without it, and along axes where it has 0, each is the largest that fits into the image
    with the input's proportions.
    """
    window = window or (0,) * len(input_size)
    sizes, free = _sizes(source, input_size, progress), np.equal(window, 0)
    boxes = window_boxes(np.zeros((len(source), len(window))), sizes, window)
    if free.any():
        boxes[:, free] = eval_box(sizes[:, free], tuple(np.array(input_size)[free].tolist()))
    return Windows(source, sizes, boxes)


def _hold(fitted: Fitted, config: DataConfig, bad: BadFiles, progress: Progress | None) -> list[Held | None]:
    """The images of each source in memory, as far as `config.cache` wants them there and they fit."""
    held: list[Held | None] = []
    sizes: dict[int, int] = {}  # of the arrays in memory, by address: two sources may be parts of one
    for source, seen in zip(fitted.sources, fitted.probes, strict=True):
        whole = source.whole()
        is_there = whole is not None and whole[0].ctypes.data in sizes
        item = None
        most = bytes_to_keep(config.memory_limit) if config.cache == "auto" else memory()
        free = math.inf if is_there else most - sum(sizes.values())
        if config.cache == "auto":
            item = hold_if_it_fits(source, seen, free, bad, progress)
        elif config.cache != "none":
            try:
                item = hold(source, free, bad, progress)
            except DoesNotFitError as error:
                problem = f"data.cache is {config.cache!r}, but {error}"
                raise ConfigError(problem, "set data.cache to auto or none") from error
        if item is not None:
            sizes[item.images.data_ptr()] = item.images.nbytes
        held.append(item)
    return held


def hold_if_it_fits(source: Source, seen: Probe, limit: float, bad: BadFiles, progress: Progress | None) -> Held | None:
    """The images in memory, if they take `limit` bytes at most and are of one size."""
    if len(seen.sizes) > 1:
        return None
    try:
        return hold(source, limit, bad, progress)
    except DoesNotFitError:
        return None


def _on_device(held: Sequence[Held | None], config: DataConfig, device: torch.device) -> list[Held | None]:
    """The images in the device's own memory, where `config.cache` asks for that or it costs little of it."""
    moved: dict[int, torch.Tensor] = {}  # parts of one array are moved once
    placed: list[Held | None] = []
    for item in held:
        wanted = config.cache == "device"
        if config.cache == "auto" and item is not None and device.type == "cuda":
            wanted = item.images.nbytes <= torch.cuda.mem_get_info(device)[0] * _DEVICE_SHARE
        if item is None or not (wanted or item.images.data_ptr() in moved):
            placed.append(item)
            continue
        key = item.images.data_ptr()
        try:
            moved[key] = moved[key] if key in moved else item.images.to(device)
            valid = None if item.valid is None else item.valid.to(device)
        except torch.OutOfMemoryError:
            problem = (
                f"data.cache is {config.cache!r}, but the images take {item.images.nbytes / GIB:.1f} GiB of {device}"
            )
            raise ConfigError(problem, "set data.cache to memory") from None
        placed.append(replace(item, images=moved[key], valid=valid))
    return placed


def _measure(config: DataConfig, fitted: Fitted, source: Source, progress: Progress | None) -> Measured:
    """Mean, deviation and range of the training images; those that the settings give count."""
    for name, values in (("mean", config.mean), ("std", config.std)):
        if values is not None and len(values) != fitted.channels:
            problem = f"data.{name} has {len(values)} numbers and the images {fitted.channels} channels"
            raise ConfigError(problem, f"give {fitted.channels}, or leave data.mean and data.std out")
    sample = SAMPLE if config.mean is None else FEW
    kinds, how = fitted.probes[0].kinds, config.normalise
    measured = measure(source, scale=config.scale, kinds=kinds, sample=sample, normalise=how, progress=progress)
    if config.mean is None or config.std is None:
        return measured
    return measured._replace(normalisation=replace(measured.normalisation, mean=config.mean, std=config.std))
