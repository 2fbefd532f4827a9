"""What a worker process does: decodes, crops and resizes the images of a batch."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from torchmae.data.plan import Indices
from torchmae.data.reading import read_or_next
from torchmae.data.sources import Image, Labels, Source
from torchmae.data.transforms import CROP_NUMBERS, Boxes, crop_boxes, eval_box, resample, value_range
from torchmae.errors import DataError
from torchmae.random import Purpose, uniform


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
        if tensor.dtype == torch.uint8 and len(target) == 2:
            # PyTorch's integer kernel: many times faster on photographs, and within a level or so on natural images.
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


def start_worker(worker: int) -> None:
    """One thread a worker; and the main process alone decides what Ctrl-C and SIGTERM, sent to all, mean."""
    del worker
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
