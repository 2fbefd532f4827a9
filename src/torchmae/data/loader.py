"""From the settings to batches on the device: images held in memory, or read by worker processes."""

from __future__ import annotations

import signal
import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from torchmae.config import DataConfig
from torchmae.data.decode import BadFiles
from torchmae.data.layouts import open_splits
from torchmae.data.memory import DoesNotFitError, Held, hold
from torchmae.data.plan import Indices, Plan, hold_out, shard
from torchmae.data.reading import Probe, Progress, num_cores, probe, read_or_next, statistics
from torchmae.data.sources import ArraySource, Image, Labels, Source, Subset, relabel
from torchmae.data.transforms import CROP_NUMBERS, Boxes, crop_boxes, eval_box, normalise, resample, value_range
from torchmae.errors import ConfigError, DataError
from torchmae.random import Purpose, uniform

_MAX_WORKERS = 8
_GIB = 2**30


@dataclass(frozen=True)
class Batch:
    """Images for the model.

    Attributes:
        images: (B, C, *input_size) float32, normalised, on the device.
        labels: (B,) int64 on the device, -1 where unknown.
        indices: (B,) which images of the loader these are.
        epoch: the epoch they were drawn in; 0 in evaluation.
    """

    images: Tensor
    labels: Tensor
    indices: Indices
    epoch: int


@dataclass(frozen=True)
class View:
    """How an image becomes the model's input.

    Attributes:
        input_size: spatial size of the model's input.
        crop_scale: as in DataConfig.
        crop_ratio: as in DataConfig.
        flip: as in DataConfig.
    """

    input_size: tuple[int, ...]
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: bool


class Request(NamedTuple):
    """A batch to make.

    Attributes:
        indices: (B,) which images.
        seed: of crops and flips; None: evaluation, without either.
        epoch: of crops and flips.
    """

    indices: Indices
    seed: int | None
    epoch: int


def draw_views(request: Request, sizes: Sequence[tuple[int, ...]], view: View) -> tuple[Boxes, npt.NDArray[np.bool_]]:
    """The box and the flip of each image of a request: functions of (seed, epoch, index) and its size.

    Args:
        request: the images.
        sizes: the spatial size of each, or one for all.
        view: what to draw from.

    Returns:
        (B, n, 2) boxes and (B,) flips.
    """
    count, target = len(request.indices), view.input_size
    if count == 0:  # a rank's part of a batch smaller than the world
        return np.empty((0, len(target), 2), dtype=np.int64), np.empty(0, dtype=bool)
    if request.seed is None:
        boxes = np.stack([eval_box(size, target) for size in sizes])
        return np.repeat(boxes, count // len(boxes), axis=0), np.zeros(count, dtype=bool)
    u = uniform(request.seed, request.epoch, request.indices, Purpose.CROP, CROP_NUMBERS)
    parts = np.split(u, len(sizes))
    crops = [
        crop_boxes(part, size, view.crop_scale, view.crop_ratio, target)
        for part, size in zip(parts, sizes, strict=True)
    ]
    drawn = uniform(request.seed, request.epoch, request.indices, Purpose.FLIP, 1)[:, 0]
    return np.concatenate(crops), (drawn < 0.5) & view.flip


class Fetched(NamedTuple):
    """What a worker process hands back.

    Attributes:
        images: (B, C, *input_size), uint8, uint16 or float32.
        labels: (B,) int64.
        bad: name and reason of each image that could not be read.
        failure: why there is no batch; None: there is.
    """

    images: Tensor
    labels: Tensor
    bad: list[tuple[str, str]]
    failure: str | None


class Reader(Dataset[Fetched]):
    """Makes batches in a worker process: decodes, crops and resizes, and leaves integers integers.

    Args:
        source: the images.
        channels: of each image.
        view: how they become the model's input.
    """

    def __init__(self, source: Source, channels: int, view: View) -> None:
        self.source = source
        self.channels = channels
        self.view = view

    def __getitem__(self, request: Request) -> Fetched:
        bad: list[tuple[str, str]] = []
        try:
            readings = [read_or_next(self.source, int(index), bad) for index in request.indices]
        except DataError as error:  # as text: an exception from a worker arrives with its traceback for a message
            return Fetched(torch.empty(0), torch.empty(0), bad, str(error))
        images = [image for _, image in readings]
        boxes, flips = draw_views(request, [image.shape[:-1] for image in images], self.view)
        target = self.view.input_size
        cut_out = [cut(*item, target) for item in zip(images, boxes, flips.tolist(), strict=True)]
        labels = labels_of(self.source.labels, np.array([read for read, _ in readings], dtype=np.int64))
        if not cut_out:
            return Fetched(torch.empty(0, self.channels, *target), labels, bad, None)
        return Fetched(stack(cut_out), labels, bad, None)


def cut(image: Image, box: npt.NDArray[np.int64], flip: bool, target: tuple[int, ...]) -> Tensor:
    """Crops one image and resamples it as `resample` does: (*size, C) to (C, *target), of the same type."""
    cropped = image[tuple(slice(start, start + length) for start, length in box)]
    tensor = torch.from_numpy(np.ascontiguousarray(np.moveaxis(cropped, -1, 0)))
    if tensor.shape[1:] != target:
        if (
            tensor.dtype == torch.uint8 and len(target) == 2
        ):  # PyTorch's integer kernel: ten times faster on photographs
            tensor = F.interpolate(tensor[None], size=target, mode="bicubic", antialias=True)[0]
        else:
            whole = np.array([[[0, length] for length in tensor.shape[1:]]])
            tensor = resample(tensor[None], whole, target, np.array([False]))[0].to(tensor.dtype)
    return tensor.flip(-1) if flip else tensor


def stack(images: list[Tensor]) -> Tensor:
    """Stacks images that may differ in type: bytes beside 16 bits are widened, integers beside floats scaled."""
    kinds = {image.dtype for image in images}
    if len(kinds) == 1:
        return torch.stack(images)
    if any(kind.is_floating_point for kind in kinds):
        return torch.stack([image.float() / value_range(image.dtype) for image in images])
    wide = [image.int() * (257 if image.dtype == torch.uint8 else 1) for image in images]  # 255 * 257 = 65535
    return torch.stack(wide).to(torch.uint16)


def labels_of(labels: Labels | None, indices: Indices) -> Tensor:
    """(B,) int64 labels of some images, -1 where there are none."""
    return torch.from_numpy(np.full(len(indices), -1) if labels is None else labels[indices])


def _start_worker(worker: int) -> None:
    """One thread a worker; and the main process alone decides what Ctrl-C and SIGTERM, sent to all, mean."""
    del worker
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class ImageLoader:
    """Batches of one set of images.

    What a batch holds is a function of the plan (or the indices) alone: neither the number of workers, nor the
    step that iteration starts at, nor holding images in memory or not (but for rounding) changes it.

    Args:
        source: the images.
        held: the same images in memory; None: they are read by worker processes.
        view: how they become the model's input.
        mean: one for each channel, of values in [0, 1].
        std: one for each channel, of values in [0, 1].
        device: where batches go.
        num_workers: processes that read, where images are not held; 0: this one.
        bad: takes the images that cannot be read.
    """

    def __init__(
        self,
        source: Source,
        held: Held | None,
        *,
        view: View,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        num_workers: int,
        bad: BadFiles,
    ) -> None:
        self.source = source
        self.labels = source.labels if held is None else held.labels
        self._held = held
        self._view = view
        self._mean = torch.tensor(mean, device=device)
        self._std = torch.tensor(std, device=device)
        self._device = device
        self._num_workers = num_workers
        self._bad = bad
        self._running: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()

    def __len__(self) -> int:
        return len(self.source)

    @property
    def in_memory(self) -> bool:
        """Whether the images are held in memory."""
        return self._held is not None

    def train_batches(
        self, plan: Plan, start: int, stop: int, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """This rank's part of the batches of steps `start` to `stop - 1`, randomly cropped and flipped.

        Raises:
            DataError: more unreadable images than allowed; when their batch is due.
        """

        def requests() -> Iterator[Request]:
            for step in range(start, stop):
                epoch, indices = plan.indices(step)
                yield Request(shard(indices, rank, world_size), plan.seed, epoch)

        return self._batches(requests(), stop - start)

    def eval_batches(self, indices: Indices, batch_size: int) -> Iterator[Batch]:
        """Images in the order given: the largest centred box with the input's proportions, not flipped.

        Raises:
            DataError: more unreadable images than allowed; when their batch is due.
        """
        starts = range(0, len(indices), batch_size)
        return self._batches((Request(indices[i : i + batch_size], None, 0) for i in starts), len(starts))

    def close(self) -> None:
        """Ends whatever iterations are under way, and their worker processes."""
        for running in list(self._running):
            running.close()

    def _batches(self, requests: Iterator[Request], count: int) -> Iterator[Batch]:
        batches = self._from_memory(requests, self._held) if self._held else self._from_workers(requests, count)
        self._running.add(batches)
        return batches

    def _from_memory(self, requests: Iterator[Request], held: Held) -> Generator[Batch, None, None]:
        size = tuple(held.images.shape[2:])
        scale = value_range(held.images.dtype)
        for request in requests:
            boxes, flips = draw_views(request, [size], self._view)
            images = resample(self._to_device(held.gather(request.indices)), boxes, self._view.input_size, flips)
            yield self._batch(images, scale, labels_of(held.labels, request.indices), request)

    def _from_workers(self, requests: Iterator[Request], count: int) -> Generator[Batch, None, None]:
        asked: list[Request] = []

        def noted() -> Iterator[Request]:
            for request in requests:
                asked.append(request)
                yield request

        workers = min(self._num_workers, count)
        loader = DataLoader(
            Reader(self.source, len(self._mean), self._view),
            sampler=noted(),
            batch_size=None,  # the reader makes whole batches
            collate_fn=_as_it_is,
            num_workers=workers,
            worker_init_fn=_start_worker,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # else starting workers would advance the global one
        )
        for fetched in _survivors(loader):
            for name, reason in fetched.bad:
                self._bad.add(name, reason)
            if fetched.failure is not None:
                raise DataError(fetched.failure)
            images = self._to_device(fetched.images)
            yield self._batch(images, value_range(fetched.images.dtype), fetched.labels, asked.pop(0))

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self._device.type == "cuda" and not tensor.is_pinned():
            tensor = tensor.pin_memory()  # else the copy would wait for the steps before it
        return tensor.to(self._device, non_blocking=True)

    def _batch(self, images: Tensor, scale: float, labels: Tensor, request: Request) -> Batch:
        normalised = normalise(images, self._mean, self._std, scale)
        return Batch(normalised, self._to_device(labels), request.indices, request.epoch)


def _survivors(loader: DataLoader[Fetched]) -> Iterator[Fetched]:
    """What the workers hand back; DataError when one of them dies."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that reads images ended unexpectedly ({' '.join(str(error).split())[:100]})",
            "most often memory ran out: lower data.num_workers or batch_size",
        ) from error


def _as_it_is(fetched: Any) -> Any:
    return fetched


@dataclass(frozen=True)
class Data:
    """An opened data set.

    Attributes:
        train: training images.
        val: held-out images; None: there are none.
        channels: of every image.
        mean: one for each channel, of values in [0, 1].
        std: one for each channel, of values in [0, 1].
        classes: the name of each label, where known.
        fingerprint: of the training images: changes when they do.
        bad: the images that could not be read so far, of both sets.
    """

    train: ImageLoader
    val: ImageLoader | None
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] | None
    fingerprint: str
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
    train, val = choose_splits(
        config, open_splits(config.source, config.root, spatial_dims=len(input_size)), input_size
    )
    seen = _checked_probe(train, input_size)
    channels = seen.channels if channels is None else channels
    train, val = train.with_channels(channels), None if val is None else val.with_channels(channels)
    bad = BadFiles(len(train) + (0 if val is None else len(val)), config.max_bad)
    limit = config.memory_limit * _GIB
    held = _hold(train, config, limit, seen, bad, progress)
    val_limit = limit - held.nbytes if held else limit
    val_held = None if val is None else _hold(val, config, val_limit, _checked_probe(val, input_size), bad, progress)
    mean, std = _mean_and_std(config, train, held, channels, progress)
    num_workers = min(num_cores(), _MAX_WORKERS) if config.num_workers is None else config.num_workers
    view = View(input_size, config.crop_scale, config.crop_ratio, config.flip)

    def loader(source: Source, in_memory: Held | None) -> ImageLoader:
        return ImageLoader(
            source, in_memory, view=view, mean=mean, std=std, device=device, num_workers=num_workers, bad=bad
        )

    return Data(
        train=loader(train, held),
        val=None if val is None else loader(val, val_held),
        channels=channels,
        mean=mean,
        std=std,
        classes=train.classes,
        fingerprint=train.fingerprint(),
        bad=bad,
    )


def choose_splits(
    config: DataConfig, splits: dict[str, Source], input_size: tuple[int, ...]
) -> tuple[Source, Source | None]:
    """The training images, and the held-out ones that `config.val` asks for.

    "auto" never takes a test split: where there is no "val", some of the training images are held out.
    """
    train = splits["train"]
    if config.val == "none":
        return train, None
    if config.val == "auto" and "val" not in splits:
        kept, held_out = hold_out(len(train), config.val_size)
        return (Subset(train, kept), Subset(train, held_out)) if len(held_out) else (train, None)
    name = "val" if config.val == "auto" else config.val
    if name == "train":
        raise ConfigError("data.val is 'train'", "hold out other images than those trained on: auto or a path")
    if name in splits:
        return train, splits[name]
    try:
        val = open_splits(config.val, config.root, spatial_dims=len(input_size))["train"]
    except DataError as error:
        others = [split for split in splits if split != "train"]
        raise ConfigError(
            f"data.val {config.val!r} cannot be used: {error.problem}",
            f"choose from auto, none, {', '.join([*others, 'or a path'])}",
        ) from error
    return train, val if train.classes is None else relabel(val, train.classes)


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
        raise ConfigError(f"data.cache is 'memory', but {error}", "set data.cache to auto or none") from error


def _mean_and_std(
    config: DataConfig, train: Source, held: Held | None, channels: int, progress: Progress | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if config.mean is None or config.std is None:
        return statistics(train if held is None else _as_source(held), progress=progress)
    for name, values in (("mean", config.mean), ("std", config.std)):
        if len(values) != channels:
            raise ConfigError(
                f"data.{name} has {len(values)} numbers and the images {channels} channels",
                f"give {channels}, or leave data.mean and data.std out",
            )
    return config.mean, config.std


def _as_source(held: Held) -> Source:
    """Images that are in memory, read from there."""
    images = held.images.movedim(1, -1).numpy()
    source = ArraySource(images, title="images", spatial_dims=images.ndim - 2)
    return source if held.rows is None else Subset(source, held.rows)
