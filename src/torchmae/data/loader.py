"""Batches on the device: which samples make up which step, held in memory or decoded by worker processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain
from multiprocessing import connection
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as PillowImage
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, get_worker_info

from torchmae.data.arrays import Held
from torchmae.data.formats import BUILT_IN, FORMATS
from torchmae.data.groups import hold_out_groups
from torchmae.data.items import Image, Valid, quiet_pillow
from torchmae.data.reading import BadFiles, first_readable
from torchmae.data.sources import Labels, Source
from torchmae.data.transforms import (
    CROP_NUMBERS,
    FULL_SCALE,
    TRIES,
    Boxes,
    Normalisation,
    crop_boxes,
    eval_box,
    mirror,
    reduction,
    resample,
    resample_valid,
    to_device,
    window_boxes,
)
from torchmae.errors import DataError, reason_of
from torchmae.machine import free_shared_memory
from torchmae.random import Purpose, permutation, uniform

Indices = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float32]  # random ones, a row of CROP_NUMBERS for each crop; (B, 0) in evaluation

Finish = Callable[..., Any]  # takes images before normalisation, their stored type, labels, the request, `valid`

PER_WORKER = 4  # slots: two batches that PyTorch asks for in advance, and two on their way to a GPU
_ATTEMPTS = 4  # crops of an image that are drawn where less than half of the first holds data
_GROUP = 16  # images that are opened, then decoded, then cut up together
_GROUP_PIXELS = 2**22  # of such images: 12 MB in colour


@dataclass(frozen=True)
class Plan:
    """The order of a run: every sample once an epoch, in an order of the epoch's own.

    The last batch of an epoch has the images that are left; the official MAE code drops it.
    """

    num_samples: int
    batch_size: int  # of a step over all ranks
    seed: int  # of the order

    def __post_init__(self) -> None:
        assert self.num_samples >= 1
        assert self.batch_size >= 1

    @property
    def steps_per_epoch(self) -> int:
        """Steps that one pass over the samples takes."""
        return -(-self.num_samples // self.batch_size)

    def indices(self, step: int) -> tuple[int, Indices]:
        """The epoch that global step `step` (from 0) belongs to, and the samples of its global batch: (B,) int64."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        return epoch, _order(self.seed, epoch, self.num_samples)[start : start + self.batch_size]


@lru_cache(maxsize=2)  # since images are read ahead; two of a million samples are 16 MB
def _order(seed: int, epoch: int, num_samples: int) -> Indices:
    return permutation(seed, epoch, num_samples)


def shard(indices: Indices, rank: int, world_size: int) -> Indices:
    """Rank's contiguous part of a global batch; sizes differ by one at most, and may be 0."""
    return indices[len(indices) * rank // world_size : len(indices) * (rank + 1) // world_size]


def mixed_subset(length: int, count: int) -> Indices:
    """At most `count` indices below `length`: the same ones each time, in an order that mixes classes."""
    return permutation(0, 0, length, Purpose.SUBSET)[:count]


def hold_out(source: Source, val_size: int) -> tuple[Indices, Indices]:
    """Sorted training and validation indices (at most a fifth), the same whatever the seed of the run.

    Where samples belong to groups, whole groups are held out.
    """
    count = min(val_size, len(source) // 5)
    if source.groups is not None:
        held_out = hold_out_groups(source.groups, count)
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)
    order = permutation(0, 0, len(source), Purpose.HOLD_OUT)
    return np.sort(order[count:]), np.sort(order[:count])


@dataclass(frozen=True)
class View:
    """How an image becomes the model's input: its spatial size there, and crops and flips as in DataConfig.

    With a `window`, in pixels of the image, the crops are windows of that size at random places, in evaluation too.
    Axes for which it has 0 are cropped as pictures are, in evaluation too.
    """

    input_size: tuple[int, ...]
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: bool
    window: tuple[int, ...] | None = None


class Request(NamedTuple):
    """A batch to make."""

    indices: Indices  # (B,) which images; one that follows itself is decoded once
    seed: int | None  # of crops and flips; None: evaluation, without either
    epoch: int | Indices  # of crops and flips; one for all, or (B,)

    def only(self, rows: slice | Indices) -> Request:
        """The request of some of the images."""
        return Request(self.indices[rows], self.seed, self.epoch if isinstance(self.epoch, int) else self.epoch[rows])


def crop_numbers(request: Request, view: View, attempt: int = 0) -> Numbers:
    """The random numbers of each crop: (B, CROP_NUMBERS), a function of (seed, epoch, index).

    In evaluation (B, 0), or with a window of all axes those of seed 0. Another `attempt` has other numbers, for
    crops that hold too little data.
    """
    if request.seed is None and (view.window is None or 0 in view.window):
        return np.empty((len(request.indices), 0), dtype=np.float32)
    count = CROP_NUMBERS * (attempt + 1)
    return uniform(request.seed or 0, request.epoch, request.indices, Purpose.CROP, count)[:, -CROP_NUMBERS:]


def boxes_of(numbers: Numbers, size: npt.ArrayLike, view: View) -> Boxes:
    """Where images of a spatial size, (n,) or (B, n), are cropped; without numbers the centred box of evaluation."""
    if view.window is not None and 0 in view.window:
        cut, rest = np.flatnonzero(view.window), np.flatnonzero(np.equal(view.window, 0))
        sizes = np.broadcast_to(size, (len(numbers), len(view.window)))
        frames = replace(view, input_size=tuple(view.input_size[axis] for axis in rest), window=None)
        boxes = np.empty((*sizes.shape, 2), dtype=np.int64)
        own = numbers[:, TRIES - len(cut) : TRIES]  # of the last tries at a crop, which it hardly ever needs
        boxes[:, cut] = window_boxes(own, sizes[:, cut], tuple(view.window[axis] for axis in cut))
        boxes[:, rest] = boxes_of(numbers, sizes[:, rest], frames)
        return boxes
    if view.window is not None:
        return window_boxes(numbers, size, view.window)
    if numbers.shape[1] == 0:
        return eval_box(np.broadcast_to(size, (len(numbers), len(view.input_size))), view.input_size)
    return crop_boxes(numbers, size, view.crop_scale, view.crop_ratio, view.input_size)


def redrawn(request: Request, size: npt.ArrayLike, view: View, share_of: Callable[[Boxes], float]) -> Boxes:
    """The crop of one image, drawn anew while less than half of it holds data; the best of a few.

    `share_of` a box, (n, 2), is the share of its pixels that hold data.
    """
    best, most = None, -1.0
    for attempt in range(_ATTEMPTS):
        box = boxes_of(crop_numbers(request, view, attempt), size, view)[0]
        share = share_of(box)
        if share > most:
            best, most = box, share
        if most >= 0.5 or request.seed is None:
            break
    assert best is not None
    return best


def draw_flips(request: Request, view: View) -> npt.NDArray[np.bool_]:
    """(B,) whether each image is mirrored: a function of (seed, epoch, index), never in evaluation."""
    if request.seed is None or not view.flip:
        return np.zeros(len(request.indices), dtype=bool)
    return uniform(request.seed, request.epoch, request.indices, Purpose.FLIP, 1)[:, 0] < 0.5


class Fetched(NamedTuple):
    """What a worker process hands back: tensors in shared memory, or arrays, which come through a pipe."""

    images: Tensor | Image  # (B, *input_size, C), uint8, uint16 or float32, not yet mirrored
    labels: Tensor | Labels  # (B,) int64
    bad: list[tuple[str, str]]  # name and reason of each image that could not be read
    failure: str | None = None  # why there is no batch; None: there is
    slot: int | None = None  # where the images lie, to be given back (`Slots.give_back`)
    valid: Tensor | Valid | None = None  # (B, *input_size, 1) bool, False where a pixel holds no data; None: all do


class Slots:
    """Shared memory in which workers hand batches over, kept from batch to batch; made in the main process.

    New shared memory for each batch, as PyTorch takes it, costs an eighth of a worker's time (docs/performance.md).
    `room` is the number of bytes that a batch may take; a larger one goes through a pipe.
    """

    def __init__(self, num_workers: int, room: float = math.inf) -> None:
        self.room = room
        self._taken = torch.zeros(num_workers * PER_WORKER, dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]
        self._memory: dict[int, Tensor] = {}  # a worker's own

    def stack(self, images: Sequence[Tensor]) -> tuple[Tensor, int | None]:
        """In a worker: images of one size and type as one batch, (B, *size), and its slot, None where none is free."""
        worker, slot = get_worker_info(), None
        if worker is not None:
            own = range(worker.id * PER_WORKER, (worker.id + 1) * PER_WORKER)
            slot = next((slot for slot in own if slot < len(self._taken) and not self._taken[slot]), None)
        first = images[0]
        num_bytes = len(images) * first.nbytes
        if slot is not None and (slot not in self._memory or self._memory[slot].nbytes < num_bytes):
            memory = self.share(torch.empty(num_bytes, dtype=torch.uint8))
            if isinstance(memory, Tensor):
                self._memory[slot] = memory
            else:
                slot = None
        if slot is None:
            return torch.stack(list(images)), None
        self._taken[slot] = True
        batch = self._memory[slot][:num_bytes].view(first.dtype).view(len(images), *first.shape)
        torch.stack(list(images), out=batch)
        return batch, slot

    def share(self, tensor: Tensor) -> Tensor | npt.NDArray[Any]:
        """The tensor in shared memory, or an array where that has no room.

        PyTorch would share it in a thread, whose failure nobody hears of: the main process would wait for ever.
        """
        if get_worker_info() is None or tensor.is_shared():  # type: ignore[no-untyped-call]
            return tensor
        if tensor.nbytes <= self.room:
            with suppress(RuntimeError):
                tensor.share_memory_()  # type: ignore[no-untyped-call]
                return tensor
        return tensor.numpy()

    def give_back(self, slot: int | None) -> None:
        """In the main process: the batch in the slot was copied, and may be written over."""
        if slot is not None:
            self._taken[slot] = False


@dataclass(eq=False)
class Reader(Dataset[Fetched]):
    """Makes batches, most often in a worker process: decodes, crops and resizes, and leaves integers integers."""

    source: Source
    channels: int  # of each image
    view: View
    slots: Slots = field(default_factory=lambda: Slots(0))  # memory for batches; by default each gets new
    scale: Mapping[str, float] | None = None  # as in `Normalisation`

    def __getstate__(self) -> dict[str, Any]:
        added = {name: form for name, form in FORMATS.items() if BUILT_IN.get(name) is not form}
        return {**self.__dict__, "_formats": added}

    def __setstate__(self, state: dict[str, Any]) -> None:
        FORMATS.update(state.pop("_formats"))
        self.__dict__.update(state)

    @quiet_pillow()
    def __getitem__(self, request: Request) -> Fetched:
        self.source.read_ahead(request.indices)
        bad: list[tuple[str, str]] = []
        images: list[Tensor] = []
        valid: dict[int, Tensor] = {}  # of the images with pixels without data
        read: list[int] = []
        try:
            for group in _groups(self._opened(request, bad)):
                _place(group, self.view)
                # Each step for all of the group: its code and data are still in the processor's cache.
                for sample in [self._read(sample, bad) for sample in group]:
                    if sample.crops:
                        for crop, has_data in sample.crops:
                            valid[len(images)] = has_data
                            images.append(crop)
                            read.append(sample.index)
                        continue
                    cutter = cut if sample.boxes.dtype == np.int64 else cut_between_pixels
                    images += [cutter(sample.image, box, self.view.input_size) for box in sample.boxes]
                    read += [sample.index] * len(sample.boxes)
        except DataError as error:  # as text: an exception from a worker arrives with its traceback for a message
            return Fetched(np.empty(0), np.empty(0, np.int64), bad, str(error))
        labels = labels_of(self.source.labels, np.array(read, dtype=np.int64))
        if not images:  # a rank's part of a batch smaller than the world
            return Fetched(np.empty((0, *self.view.input_size, self.channels), np.float32), labels.numpy(), bad)
        batch, slot = self.slots.stack(of_one_type(images, self.scale))
        maps, share = None, self.slots.share
        if valid:
            everywhere = torch.ones(*self.view.input_size, 1, dtype=torch.bool)
            maps = torch.stack([valid.get(row, everywhere) for row in range(len(images))])
        return Fetched(share(batch), share(labels), bad, slot=slot, valid=None if maps is None else share(maps))

    def _opened(self, request: Request, bad: list[tuple[str, str]]) -> Iterator[_Sample]:
        """One sample for each run of one index; where it cannot be opened, the next that can."""
        numbers = crop_numbers(request, self.view)
        runs = np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(request.indices)) + 1)
        for rows in runs if len(numbers) else ():
            make = partial(_Sample, self.source, request.only(rows), numbers[rows])
            yield first_readable(self.source, int(request.indices[rows[0]]), bad, make)[1]

    def _read(self, sample: _Sample, bad: list[tuple[str, str]]) -> _Sample:
        """The sample with its pixels, or the next that has some."""

        def read(index: int) -> _Sample:
            ready = sample
            if index != sample.index:
                ready = _Sample(self.source, sample.request, sample.numbers, index)
                _place([ready], self.view)
            ready.read(self.view)
            return ready

        return first_readable(self.source, sample.index, bad, read)[1]


class _Sample:
    """One image on its way to crops, for each of which `numbers` has a row; DataError where it cannot be opened."""

    boxes: npt.NDArray[Any]  # of the crops, (crops, n, 2), in pixels of `image` once it is read
    image: Image
    crops: Sequence[tuple[Tensor, Tensor]] = ()  # of an image with pixels without data, and where each holds data

    def __init__(self, source: Source, request: Request, numbers: Numbers, index: int) -> None:
        self.index = index
        self.request = request
        self.numbers = numbers
        self.item = source.open(index)
        self.pixels = math.prod(self.item.size)

    def read(self, view: View) -> None:
        """Reads the pixels that the crops need; DataError where they cannot be."""
        factor = reduction(self.boxes, view.input_size) if self.item.reduces else 1
        if factor > 1:
            self.image = self.item.read(reduction=factor)
            if self.image.shape[:-1] != self.item.size:
                self.boxes = self.boxes / factor
            return
        region = []  # around all boxes; in Python, which is faster than NumPy for so few numbers
        for sides in zip(*self.boxes.tolist(), strict=True):
            start = min(start for start, _ in sides)
            region.append((start, max(start + length for start, length in sides) - start))
        self.image, valid = self.item.read_valid(tuple(region))
        if valid is None:
            self.boxes = self.boxes - np.array([[start, 0] for start, _ in region])
        else:
            self.crops = [self._with_data(self.request.only(slice(i, i + 1)), view) for i in range(len(self.boxes))]

    def _with_data(self, request: Request, view: View) -> tuple[Tensor, Tensor]:
        """One crop, (*size, C), and (*size, 1) where it holds data."""
        found: dict[bytes, tuple[Image, Valid]] = {}

        def share_of(box: Boxes) -> float:
            image, valid = self.item.read_valid(tuple((start, length) for start, length in box.tolist()))
            found[box.tobytes()] = image, np.ones(image.shape[:-1], dtype=bool) if valid is None else valid
            return float(found[box.tobytes()][1].mean())

        box = redrawn(request, self.item.size, view, share_of)
        image, valid = (torch.from_numpy(np.ascontiguousarray(item)) for item in found[box.tobytes()])
        whole = np.array([[[0, length] for length in valid.shape]])
        channels_first, flip = image[None].movedim(-1, 1), np.array([False])
        crop, has_data = resample_valid(channels_first, valid[None, None], whole, view.input_size, flip)
        return crop[0].movedim(0, -1).to(image.dtype).contiguous(), has_data[0].movedim(0, -1).contiguous()


def _place(samples: Sequence[_Sample], view: View) -> None:
    """Sets the boxes of samples' crops, of all at once: for a single one, NumPy's calls would take longer."""
    counts = [len(sample.numbers) for sample in samples]
    sizes = np.repeat([sample.item.size for sample in samples], counts, axis=0)
    boxes = boxes_of(np.concatenate([sample.numbers for sample in samples]), sizes, view)
    for sample, part in zip(samples, np.split(boxes, np.cumsum(counts)[:-1]), strict=True):
        sample.boxes = part


def _groups(samples: Iterable[_Sample]) -> Iterator[list[_Sample]]:
    """Samples in groups of as many pixels as may be held at a time."""
    group: list[_Sample] = []
    for sample in samples:
        group.append(sample)
        if len(group) == _GROUP or sum(sample.pixels for sample in group) > _GROUP_PIXELS:
            yield group
            group = []
    yield from [group] if group else ()


def cut(image: Image, box: Boxes, target: tuple[int, ...]) -> Tensor:
    """Crops one image and resamples it as `resample` does: (*size, C) to (*target, C), of the same type."""
    cropped = np.ascontiguousarray(image[tuple(slice(start, start + length) for start, length in box.tolist())])
    tensor = torch.from_numpy(cropped)
    if tensor.shape[:-1] == target:
        return tensor
    channels_first = tensor[None].movedim(-1, 1)  # PyTorch sees that channels lie last, and copies nothing
    if tensor.dtype == torch.uint8 and len(target) == 2:
        # PyTorch's integer kernel: many times faster on photographs, and within a level or so on natural images.
        resized = F.interpolate(channels_first, size=target, mode="bicubic", antialias=True)
    else:
        whole = np.array([[[0, length] for length in tensor.shape[:-1]]])
        resized = resample(channels_first, whole, target, np.array([False])).to(tensor.dtype)
    return resized[0].movedim(0, -1).contiguous()


def cut_between_pixels(image: Image, box: npt.NDArray[np.float64], target: tuple[int, ...]) -> Tensor:
    """`cut` of a picture (uint8) that was decoded at a fraction of its size, so that edges lie between pixels."""
    (top, height), (left, width) = box.tolist()
    first_row, first_column = int(top), int(left)
    outer = image[first_row : math.ceil(top + height), first_column : math.ceil(left + width)]
    within = (left - first_column, top - first_row, left - first_column + width, top - first_row + height)
    picture = PillowImage.fromarray(outer[..., 0] if outer.shape[-1] == 1 else outer)
    resized = picture.resize((target[1], target[0]), PillowImage.Resampling.BICUBIC, box=within)
    return torch.from_numpy(np.array(resized).reshape(*target, -1))


def of_one_type(images: list[Tensor], scale: Mapping[str, float] | None = None) -> list[Tensor]:
    """Casts a batch to one type: bytes beside 16 bits are widened; floats or a `data.scale` make all of it floats."""
    kinds = {image.dtype for image in images}
    if len(kinds) == 1:
        return images
    if scale or any(kind.is_floating_point for kind in kinds):
        one = {**FULL_SCALE, **(scale or {})}
        return [image.float() * (one["float32"] / one[str(image.dtype)[6:]]) for image in images]
    wide = (image.int() * (257 if image.dtype == torch.uint8 else 1) for image in images)  # 255 * 257 = 65535
    return [image.to(torch.uint16) for image in wide]


def labels_of(labels: Labels | None, indices: Indices) -> Tensor:
    """(B,) int64 labels of some images, -1 where there are none."""
    return torch.from_numpy(np.full(len(indices), -1) if labels is None else labels[indices])


def start_worker(worker: int) -> None:
    """One thread a worker; the main process alone heeds Ctrl-C and SIGTERM; none outlives it, under forkserver too."""
    del worker
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    if main is not None:
        threading.Thread(target=_end_with, args=(main.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Waits for the main process to end, however it does, and ends this one."""
    connection.wait([sentinel])
    os._exit(1)


@dataclass(frozen=True)
class Batch:
    """Images for the model."""

    images: Tensor  # (B, C, *input_size) float32, normalised, on the device
    labels: Tensor  # (B,) int64 on the device, -1 where unknown
    indices: Indices  # (B,) which images of the loader these are
    epoch: int | Indices  # that they were drawn in, one for all or, with data.repeats, (B,); 0 in evaluation
    valid: Tensor | None = None  # (B, 1, *input_size) bool, False where a pixel holds no data and is 0; None: all do

    def only(self, rows: Indices) -> Batch:
        """Some of the images."""
        chosen = torch.from_numpy(rows).to(self.images.device)
        epoch = self.epoch if isinstance(self.epoch, int) else self.epoch[rows]
        valid = None if self.valid is None else self.valid[chosen]
        return Batch(self.images[chosen], self.labels[chosen], self.indices[rows], epoch, valid)


@dataclass(eq=False)
class ImageLoader:
    """Batches of one set of images.

    The plan (or the indices) alone decides what a batch holds, whatever the workers, the first step, and where images
    are held; but for rounding, and JPEGs that workers decode at a fraction of their size (`transforms.reduction`).
    """

    source: Source
    held: Held | None  # the same images in memory, the processor's or the device's; None: workers read them
    _: KW_ONLY
    view: View
    normalisation: Normalisation
    device: torch.device
    num_workers: int  # processes that read, where images are not held; 0: this one
    bad: BadFiles  # takes the images that cannot be read
    repeats: int = 1  # as in DataConfig

    def __post_init__(self) -> None:
        self.labels = self.source.labels if self.held is None else self.held.labels
        self._normalised = self.normalisation.on(self.device)
        self._side: torch.cuda.Stream | None = None
        self._running: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()

    def __len__(self) -> int:
        return len(self.source)

    def train_batches(
        self, plan: Plan, start: int, stop: int, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """This rank's part of steps `start` to `stop - 1`, cropped and flipped; DataError: too many are bad."""

        def requests() -> Iterator[Request]:
            planned = map(plan.indices, range(start, stop))
            for epoch, indices in planned if self.repeats == 1 else repeated(plan, start, stop, self.repeats):
                mine = epoch if isinstance(epoch, int) else shard(epoch, rank, world_size)
                yield Request(shard(indices, rank, world_size), plan.seed, mine)

        return self._batches(requests(), stop - start, self._batch)

    def eval_batches(self, indices: Indices, batch_size: int) -> Iterator[Batch]:
        """Images in the order given: the largest centred box, not flipped; errors as of `train_batches`."""
        return self._eval_batches(indices, batch_size, self._batch)

    def kept_batches(self, indices: Indices, batch_size: int) -> Callable[[], Iterator[Batch]]:
        """Reads `eval_batches` into the processor's memory, in their stored type; the result gives them repeatedly."""

        def keep(images: Tensor, dtype: torch.dtype, *others: Any) -> tuple[Any, ...]:
            return images.cpu().to(dtype, copy=True), dtype, *others  # exact: resampled integers are rounded

        kept = list(self._eval_batches(indices, batch_size, keep))
        return lambda: (self._batch(to_device(item[0], self.device), *item[1:]) for item in kept)

    def room(self, workers: int) -> float:
        """Bytes of shared memory for each batch under way, so that all of them take at most half of what is free."""
        return free_shared_memory() / (2 * PER_WORKER * workers) if self.held is None and workers else math.inf

    def note_on_room(self, batch_size: int) -> str:
        """A sentence if batches of bytes are too large for shared memory, else ""."""
        workers = self.num_workers
        need = batch_size * len(self.normalisation.mean) * math.prod(self.view.input_size)
        if need <= self.room(workers):
            return ""
        wanted = 2 * PER_WORKER * workers * need >> 20
        return (
            f"batches come through pipes, which is slower: {workers} readers want {wanted:,} MiB of /dev/shm, and "
            f"{int(free_shared_memory()) >> 20:,} are free (docker run --shm-size)"
        )

    def close(self) -> None:
        """Ends whatever iterations are under way, and their worker processes."""
        for running in list(self._running):
            running.close()

    def _eval_batches(self, indices: Indices, batch_size: int, finish: Finish) -> Iterator[Any]:
        starts = range(0, len(indices), batch_size)
        return self._batches((Request(indices[i : i + batch_size], None, 0) for i in starts), len(starts), finish)

    def _batches(self, requests: Iterator[Request], count: int, finish: Finish) -> Iterator[Any]:
        if self.held is None:
            batches = self._from_workers(requests, count, finish)
        else:
            batches = self._from_memory(requests, self.held, finish)
        self._running.add(batches)
        return batches

    def _from_memory(self, requests: Iterator[Request], held: Held, finish: Finish) -> Generator[Any, None, None]:
        for request in requests:
            size, flips = tuple(held.images.shape[2:]), draw_flips(request, self.view)
            boxes = boxes_of(crop_numbers(request, self.view), size, self.view)
            if held.valid is not None and request.seed is not None:
                for row, index in enumerate(request.indices):
                    share_of = partial(held.share, int(index))
                    boxes[row] = redrawn(request.only(slice(row, row + 1)), size, self.view, share_of)
            if self.view.window is None or 0 in self.view.window:
                images, valid = held.gather(request.indices)
            else:  # of images that may be much larger
                images, valid = held.gather(request.indices, boxes)
                boxes[..., 0] = 0
            images = to_device(images, self.device)
            if valid is None:
                images = resample(images, boxes, self.view.input_size, flips)
            else:
                valid = to_device(valid, self.device)
                images, valid = resample_valid(images, valid, boxes, self.view.input_size, flips)
            labels = to_device(labels_of(held.labels, request.indices), self.device)
            yield finish(images, held.images.dtype, labels, request, valid)

    def _from_workers(self, requests: Iterator[Request], count: int, finish: Finish) -> Generator[Any, None, None]:
        asked: deque[Request] = deque()

        def noted() -> Iterator[Request]:
            for request in requests:
                asked.append(request)
                yield request

        workers = min(self.num_workers, count)
        # Copies to other devices may still be under way when their slot is given back; CUDA's are from pinned copies.
        slots = Slots(workers if self.device.type in ("cpu", "cuda") else 0, self.room(workers))
        loader = DataLoader(
            Reader(self.source, len(self.normalisation.mean), self.view, slots, self.normalisation.scale),
            sampler=noted(),
            batch_size=None,  # the reader makes whole batches
            num_workers=workers,
            worker_init_fn=start_worker,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else starting workers would advance the global one
        )
        for fetched, images, labels in self._sent(_survivors(loader)):
            for name, reason in fetched.bad:
                self.bad.add(name, reason)
            if fetched.failure is not None:
                raise DataError(fetched.failure)
            request = asked.popleft()
            mirrored = to_device(torch.from_numpy(np.flatnonzero(draw_flips(request, self.view))), self.device)
            stored_type = images.dtype
            images = mirror(images, mirrored).movedim(-1, 1)
            valid = None
            if fetched.valid is not None:
                valid = mirror(to_device(torch.as_tensor(fetched.valid), self.device), mirrored).movedim(-1, 1)
            batch = finish(images, stored_type, labels, request, valid)
            slots.give_back(fetched.slot)
            yield batch

    def _sent(self, batches: Iterator[Fetched]) -> Iterator[tuple[Fetched, Tensor, Tensor]]:
        """Each batch with its images and labels on the device; on CUDA, the next one is on its way there by then."""
        if self.device.type != "cuda":
            for fetched in batches:
                images, labels = torch.as_tensor(fetched.images), torch.as_tensor(fetched.labels)
                yield fetched, images.to(self.device), labels.to(self.device)
            return
        if self._side is None:  # one for all: what is freed on a stream serves that stream alone
            self._side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        under_way: deque[tuple[Fetched, Tensor, Tensor, torch.cuda.Event]] = deque()
        for item in chain(batches, [None]):
            if item is not None:
                with torch.cuda.stream(self._side):
                    parts = (torch.as_tensor(values) for values in (item.images, item.labels))
                    images, labels = (to_device(tensor, self.device) for tensor in parts)
                    under_way.append((item, images, labels, self._side.record_event()))
            if len(under_way) == 2 or (item is None and under_way):
                fetched, images, labels, copied = under_way.popleft()
                current = torch.cuda.current_stream(self.device)
                current.wait_event(copied)
                images.record_stream(current)  # else the side stream would reuse their memory too early
                labels.record_stream(current)
                yield fetched, images, labels

    def _batch(
        self, images: Tensor, dtype: torch.dtype, labels: Tensor, request: Request, valid: Tensor | None = None
    ) -> Batch:
        normalised = self._normalised(images, dtype, valid)
        return Batch(normalised, labels, request.indices, request.epoch, valid)


def repeated(plan: Plan, start: int, stop: int, repeats: int) -> Iterator[tuple[Indices, Indices]]:
    """Repeated augmentation: epochs and indices, (B,) each, of steps where `repeats` views of an image come in a run.

    Epochs form groups of `repeats`. A group goes once through the images, in the order of its first epoch, and takes
    of each the views (crop, flip, mask) that it would have in every epoch of the group, one after the other. Steps,
    batch sizes and what is drawn for (epoch, index) are the plan's; only which views share a batch differs.
    """
    for step in range(start, stop):
        epoch, position = divmod(step, plan.steps_per_epoch)
        first = position * plan.batch_size
        in_epoch = np.arange(first, min(first + plan.batch_size, plan.num_samples))
        views = epoch % repeats * plan.num_samples + in_epoch
        group = epoch - epoch % repeats
        yield group + views % repeats, _order(plan.seed, group, plan.num_samples)[views // repeats]


@contextmanager
def one_line_when_a_worker_ends() -> Iterator[None]:
    """The unexpected end of a process that reads images, or too many open files, become a DataError of one line.

    It belongs around what is done with batches too: PyTorch raises from a signal, wherever the main process is by then.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        reason = reason_of(error)
        if any(words in str(error) for words in ("Too many open files", "ancillary data")):
            fix = "allow more (ulimit -n 4096), or lower data.num_workers"
            raise DataError(f"this process has too many files open ({reason[:100]})", fix) from error
        if "DataLoader worker" not in str(error) and not isinstance(error, EOFError | ConnectionError):
            raise
        fix = "most often memory ran out: lower data.num_workers or batch_size"
        if "shared memory" in reason:
            fix = "enlarge /dev/shm (docker run --shm-size), or lower data.num_workers or batch_size"
        elif multiprocessing.get_start_method() != "fork" and "signal" not in reason:
            fix = f'put what the program does under `if __name__ == "__main__":`; if it is, {fix}'
        raise DataError(f"a process that reads images ended unexpectedly ({reason[:100]})", fix) from error


def _survivors(loader: DataLoader[Fetched]) -> Iterator[Fetched]:
    """The batches of one iteration, at whose end its workers end, and one whose read hangs (a lost file server) too.

    PyTorch ends them when the iteration is freed, which a traceback may put off, and with SIGTERM, which they ignore.
    """
    with one_line_when_a_worker_ends():
        batches: Any = iter(loader)
        try:
            yield from batches
        finally:
            if hasattr(batches, "_shutdown_workers"):
                batches._shutdown_workers()
                for worker in batches._workers:
                    if worker.is_alive():
                        worker.kill()
                        worker.join()
