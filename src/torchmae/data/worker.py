"""What a worker process does: decodes, crops and resizes the images of a batch."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import connection
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as PillowImage
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, get_worker_info

from torchmae.data.formats import BUILT_IN, FORMATS, Image, quiet_pillow
from torchmae.data.labels import Labels
from torchmae.data.reading import first_readable
from torchmae.data.sources import Source
from torchmae.data.transforms import CROP_NUMBERS, FULL_SCALE, Boxes, crop_boxes, eval_box, reduction, resample
from torchmae.errors import DataError
from torchmae.random import Purpose, uniform

Indices = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float32]  # random ones, a row of CROP_NUMBERS for each crop; (B, 0) in evaluation

PER_WORKER = 4  # slots: two batches that PyTorch asks for in advance, and two on their way to a GPU
_GROUP = 16  # images that are opened, then decoded, then cut up together
_GROUP_PIXELS = 2**22  # of such images: 12 MB in colour


@dataclass(frozen=True)
class View:
    """How an image becomes the model's input: its spatial size there, and crops and flips as in DataConfig."""

    input_size: tuple[int, ...]
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: bool


class Request(NamedTuple):
    """A batch to make."""

    indices: Indices  # (B,) which images; one that follows itself is decoded once
    seed: int | None  # of crops and flips; None: evaluation, without either
    epoch: int | Indices  # of crops and flips; one for all, or (B,)


def crop_numbers(request: Request) -> Numbers:
    """The random numbers of each crop: (B, CROP_NUMBERS), a function of (seed, epoch, index); in evaluation (B, 0)."""
    if request.seed is None:
        return np.empty((len(request.indices), 0), dtype=np.float32)
    return uniform(request.seed, request.epoch, request.indices, Purpose.CROP, CROP_NUMBERS)


def boxes_of(numbers: Numbers, size: npt.ArrayLike, view: View) -> Boxes:
    """Where images of a spatial size, (n,) or (B, n), are cropped; without numbers the centred box of evaluation."""
    if numbers.shape[1] == 0:
        return eval_box(np.broadcast_to(size, (len(numbers), len(view.input_size))), view.input_size)
    return crop_boxes(numbers, size, view.crop_scale, view.crop_ratio, view.input_size)


def draw_flips(request: Request, view: View) -> npt.NDArray[np.bool_]:
    """(B,) whether each image is mirrored: a function of (seed, epoch, index), never in evaluation."""
    if request.seed is None or not view.flip:
        return np.zeros(len(request.indices), dtype=bool)
    return uniform(request.seed, request.epoch, request.indices, Purpose.FLIP, 1)[:, 0] < 0.5


class Fetched(NamedTuple):
    """What a worker process hands back."""

    images: Tensor  # (B, *input_size, C), uint8, uint16 or float32, not yet mirrored
    labels: Tensor  # (B,) int64
    bad: list[tuple[str, str]]  # name and reason of each image that could not be read
    failure: str | None = None  # why there is no batch; None: there is
    slot: int | None = None  # where the images lie, to be given back (`Slots.give_back`)


class Slots:
    """Shared memory in which workers hand batches over, kept from batch to batch; made in the main process.

    PyTorch takes new shared memory for each batch, which the system clears page by page as it is written: an eighth of
    the time that a worker needs for a batch of JPEGs on one machine (docs/performance.md). Here each worker has some of
    its own, and is told which of it is free again. Without workers there are no slots.
    """

    def __init__(self, num_workers: int) -> None:
        self._taken = torch.zeros(num_workers * PER_WORKER, dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]
        self._memory: dict[int, Tensor] = {}  # a worker's own

    def stack(self, images: Sequence[Tensor]) -> tuple[Tensor, int | None]:
        """In a worker: images of one size and type as one batch, (B, *size), and the slot that it lies in.

        The slot is None where the batch has memory of its own: outside of workers, and where no slot is free.
        """
        worker, slot = get_worker_info(), None
        if worker is not None:
            own = range(worker.id * PER_WORKER, (worker.id + 1) * PER_WORKER)
            slot = next((slot for slot in own if slot < len(self._taken) and not self._taken[slot]), None)
        if slot is None:
            return torch.stack(list(images)), None
        self._taken[slot] = True
        first = images[0]
        num_bytes = len(images) * first.nbytes
        if slot not in self._memory or self._memory[slot].nbytes < num_bytes:
            self._memory[slot] = torch.empty(num_bytes, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
        batch = self._memory[slot][:num_bytes].view(first.dtype).view(len(images), *first.shape)
        torch.stack(list(images), out=batch)
        return batch, slot

    def give_back(self, slot: int | None) -> None:
        """In the main process: the batch in the slot was copied, and may be written over."""
        if slot is not None:
            self._taken[slot] = False


@dataclass(eq=False)
class Reader(Dataset[Fetched]):
    """Makes batches in a worker process: decodes, crops and resizes, and leaves integers integers."""

    source: Source
    channels: int  # of each image
    view: View
    slots: Slots = field(default_factory=lambda: Slots(0))  # memory for batches; by default each gets new
    scale: Mapping[str, float] | None = None  # as in `Normalisation`

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_formats": {name: form for name, form in FORMATS.items() if BUILT_IN.get(name) is not form},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        FORMATS.update(state.pop("_formats"))
        self.__dict__.update(state)

    @quiet_pillow()
    def __getitem__(self, request: Request) -> Fetched:
        self.source.read_ahead(request.indices)
        bad: list[tuple[str, str]] = []
        images: list[Tensor] = []
        read: list[int] = []
        try:
            for group in _groups(self._opened(request, bad)):
                _place(group, self.view)
                # Each step for all of the group: its code and data are still in the processor's cache.
                for sample in [self._read(sample, bad) for sample in group]:
                    crops = sample.crops(self.view.input_size)
                    images += crops
                    read += [sample.index] * len(crops)
        except DataError as error:  # as text: an exception from a worker arrives with its traceback for a message
            return Fetched(torch.empty(0), torch.empty(0), bad, str(error))
        labels = labels_of(self.source.labels, np.array(read, dtype=np.int64))
        if not images:  # a rank's part of a batch smaller than the world
            return Fetched(torch.empty(0, *self.view.input_size, self.channels), labels, bad)
        batch, slot = self.slots.stack(of_one_type(images, self.scale))
        return Fetched(batch, labels, bad, slot=slot)

    def _opened(self, request: Request, bad: list[tuple[str, str]]) -> Iterator[_Sample]:
        """One sample for each run of one index; where it cannot be opened, the next that can."""
        numbers = crop_numbers(request)
        runs = np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(request.indices)) + 1)
        for rows in runs if len(numbers) else ():
            make = partial(_Sample, self.source, numbers[rows])
            yield first_readable(self.source, int(request.indices[rows[0]]), bad, make)[1]

    def _read(self, sample: _Sample, bad: list[tuple[str, str]]) -> _Sample:
        """The sample with its pixels, or the next that has some."""

        def read(index: int) -> _Sample:
            ready = sample
            if index != sample.index:
                ready = _Sample(self.source, sample.numbers, index)
                _place([ready], self.view)
            ready.read(self.view.input_size)
            return ready

        return first_readable(self.source, sample.index, bad, read)[1]


class _Sample:
    """One image on its way to crops, for each of which `numbers` has a row; DataError where it cannot be opened."""

    boxes: npt.NDArray[Any]  # of the crops, (crops, n, 2), in pixels of `image` once it is read
    image: Image

    def __init__(self, source: Source, numbers: Numbers, index: int) -> None:
        self.index = index
        self.numbers = numbers
        self.item = source.open(index)
        self.pixels = math.prod(self.item.size)

    def read(self, target: tuple[int, ...]) -> None:
        """Reads the pixels that the crops need; DataError where they cannot be."""
        factor = reduction(self.boxes, target) if self.item.reduces else 1
        if factor > 1:
            self.image = self.item.read(reduction=factor)
            if self.image.shape[:-1] != self.item.size:
                self.boxes = self.boxes / factor
            return
        region = []  # around all boxes; in Python, which is faster than NumPy for so few numbers
        for sides in zip(*self.boxes.tolist(), strict=True):
            start = min(start for start, _ in sides)
            region.append((start, max(start + length for start, length in sides) - start))
        self.image = self.item.read(tuple(region))
        self.boxes = self.boxes - np.array([[start, 0] for start, _ in region])

    def crops(self, target: tuple[int, ...]) -> list[Tensor]:
        """The crops, (*target, C) each; after `read`."""
        cutter = cut if self.boxes.dtype == np.int64 else cut_between_pixels
        return [cutter(self.image, box, target) for box in self.boxes]


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
    if group:
        yield group


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
    """One thread a worker; the main process alone decides what Ctrl-C and SIGTERM, sent to all, mean; none outlives it.

    PyTorch's own watch asks whether a worker's parent is still there. Under the forkserver start method, Python
    3.14's default, that parent is the fork server, which lives as long as its workers do.
    """
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
