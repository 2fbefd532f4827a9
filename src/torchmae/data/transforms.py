"""Crops, flips, resampling and normalisation: functions of given random numbers, for 1 to 3 spatial dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Boxes = npt.NDArray[np.int64]  # (B, n, 2): start and length in pixels on each of n axes

TRIES = 10
CROP_NUMBERS = 2 * TRIES + 2  # random numbers of a crop: area and aspect of ten tries, and a place on two axes
_LONG = 2**21  # pixels times target pixels of an axis, above which a matrix is not worth its zeros
_MAX_WEIGHTS = 2**24  # of one axis at a time: 64 MB, and a few times that in passing


def crop_boxes(
    u: npt.NDArray[np.float32],
    size: npt.ArrayLike,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    target: tuple[int, ...],
) -> Boxes:
    """Random crops: (B, n, 2) boxes inside the images, of n = 1 to 3 spatial axes.

    In 2-D, torchvision's RandomResizedCrop: ten tries at an area and an aspect ratio (log-uniform), the first box that
    fits is placed at random; when none fits, the largest centred box whose aspect is allowed. Unlike there, the aspect
    ratio (width / height) is relative to the target's, and a scale of (1, 1) takes the centred box at once. In 1-D and
    3-D every axis keeps the same share, size * area ** (1 / n), and `ratio` is not used.

    `u` is (B, CROP_NUMBERS), uniform in [0, 1); `size` that of all images, (n,), or of each, (B, n); `scale` the
    smallest and largest share of the image's area (length, volume), in (0, 1]; `target` the size after resampling.
    """
    numbers = u.astype(np.float64)
    sizes = np.broadcast_to(np.asarray(size), (len(u), len(target)))
    waiting = np.arange(len(u) if len(target) == 2 else 0)  # for a try that fits: nearly all find one at first
    if len(target) == 2:
        height, width = sizes.T
        extremes = np.array(ratio) * (target[1] / target[0])
        aspect = np.clip(width / height, *extremes)
        centred = np.stack([np.rint(width / aspect), np.rint(height * aspect)], axis=-1)
        lengths = np.clip(centred, 1, sizes).astype(np.int64)
        low, high = map(math.log, extremes)
        for i in range(TRIES if scale[0] < 1 else 0):
            area = (height * width)[waiting] * (scale[0] + (scale[1] - scale[0]) * numbers[waiting, i])
            aspect = np.exp(low + (high - low) * numbers[waiting, TRIES + i])
            tried = np.stack([np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))], axis=-1)
            fits = ((tried >= 1) & (tried <= sizes[waiting])).all(axis=1)
            lengths[waiting[fits]] = tried[fits]
            waiting = waiting[~fits]
            if not len(waiting):
                break
    else:
        share = (scale[0] + (scale[1] - scale[0]) * numbers[:, :1]) ** (1 / len(target))
        lengths = np.clip(np.rint(sizes * share), 1, sizes).astype(np.int64)
    free = sizes - lengths
    starts = np.floor(numbers[:, -len(target) :] * (free + 1)).astype(np.int64)
    starts[waiting] = free[waiting] // 2  # what found none gets the centred box
    return np.stack([starts, lengths], axis=-1)


def window_boxes(u: npt.NDArray[Any], size: npt.ArrayLike, window: tuple[int, ...]) -> Boxes:
    """Windows, (B, n, 2) boxes, at the places that `u`, (B, n or more) in [0, 1), gives by its last columns.

    `size` is that of all images, (n,), or of each, (B, n). Of an image that is smaller along an axis, the window is
    reduced along all, unless a length of `window` is 0, for the whole axis. Without columns, the window in the middle.
    """
    sizes = np.broadcast_to(np.asarray(size), (len(u), len(window)))
    u = u if u.shape[1] else np.full((len(u), len(window)), 0.5)
    lengths = np.minimum(np.where(window, window, sizes), sizes)
    if 0 not in window:
        lengths = np.clip(np.rint(window * np.minimum((sizes / window).min(-1, keepdims=True), 1)), 1, sizes)
    starts = np.floor(u[:, -len(window) :].astype(np.float64) * (sizes - lengths + 1))
    return np.stack([starts, lengths], axis=-1).astype(np.int64)


def eval_box(size: npt.ArrayLike, target: tuple[int, ...]) -> Boxes:
    """The largest centred box with the target's proportions, (..., n, 2), in images of `size`, (..., n)."""
    sizes = np.asarray(size)
    factor = (sizes / target).min(axis=-1, keepdims=True)
    lengths = np.clip(np.rint(target * factor), 1, sizes).astype(np.int64)
    return np.stack([(sizes - lengths) // 2, lengths], axis=-1)


def reduction(boxes: Boxes, target: tuple[int, ...]) -> int:
    """The largest of 1, 2, 4 and 8 that images may be divided by before boxes are cut out and resampled to `target`.

    Every box keeps 1.5 times the target's pixels along each axis, which moves a crop by 1% of full scale at most.
    """
    room = min(length / wanted for box in boxes.tolist() for (_, length), wanted in zip(box, target, strict=True))
    return next((factor for factor in (8, 4, 2) if room >= 1.5 * factor), 1)


def resample(images: Tensor, boxes: Boxes, target: tuple[int, ...], flip: npt.NDArray[np.bool_]) -> Tensor:
    """Cuts a box out of each image and resamples it: separable, antialiased bicubic (a = -0.5, as in Pillow).

    (B, C, *size) floats or unsigned integers on any device become (B, C, *target) float32; integers are rounded and
    clamped to their range, as if stored in between. `flip`, (B,), says whether to mirror the last axis.

    Only pixels inside the box contribute. A weight matrix per image and axis, one batched product per axis, a flip the
    reversed matrix of the last axis; `resample_long` takes axes so long that most weights would be zeros.
    """
    batch, size = len(images), tuple(images.shape[2:])
    resampled = images.float()
    if batch == 0:
        return resampled.new_empty(0, images.shape[1], *target)
    # Boxes and flips stay NumPy's up to here, so that this question does not wait for an accelerator.
    if size == target and (boxes == [(0, length) for length in size]).all() and not flip.any():
        return resampled
    products = [have * want for have, want in zip(size, target, strict=True)]
    part = max(1, _MAX_WEIGHTS // min(max(products), _LONG))
    if batch > part:
        starts = [slice(i, i + part) for i in range(0, batch, part)]
        return torch.cat([resample(images[i], boxes[i], target, flip[i]) for i in starts])
    box_tensor = to_device(torch.from_numpy(boxes), images.device)
    mirrored = to_device(torch.from_numpy(flip), images.device)[:, None, None]
    for axis in reversed(range(len(size))):
        # The axis in hand is the last; the product moves it to the front, which brings the next one to the end.
        rest = resampled.shape[1:-1]
        rows = resampled.reshape(batch, math.prod(rest), size[axis])
        is_long = products[axis] > _LONG
        if is_long:
            weights = resample_long(rows, boxes[:, axis], target[axis]).transpose(1, 2)  # (B, target, rest)
        else:
            weights = resample_weights(box_tensor[:, axis], size[axis], target[axis])  # (B, target, source)
        if axis == len(size) - 1:
            weights = torch.where(mirrored, weights.flip(1), weights)
        columns = weights if is_long else torch.bmm(weights, rows.transpose(1, 2))
        resampled = columns.reshape(batch, target[axis], *rest)
    resampled = resampled.movedim(-1, 1).contiguous()  # every axis has moved in front of the channels
    if images.is_floating_point():
        return resampled
    return resampled.round_().clamp_(0, torch.iinfo(images.dtype).max)


def resample_valid(
    images: Tensor, valid: Tensor, boxes: Boxes, target: tuple[int, ...], flip: npt.NDArray[np.bool_]
) -> tuple[Tensor, Tensor]:
    """`resample` of the pixels that hold data alone; no other pixel counts, whatever its value.

    `valid`, (B, 1, *size) bool, becomes (B, 1, *target): a pixel holds data where most of its source does. The others
    are 0.
    """
    share = resample(valid.float(), boxes, target, flip)
    sums = resample(torch.where(valid, images.float(), 0.0), boxes, target, flip)
    kept = share > 0.5
    values = torch.where(kept, sums / share, 0.0)
    if images.is_floating_point():
        return values, kept
    return values.round_().clamp_(0, torch.iinfo(images.dtype).max), kept


def resample_long(values: Tensor, boxes: Boxes, target: int) -> Tensor:
    """What `resample` does along one axis, without a matrix: (B, rows, length) float32 to (B, rows, target)."""

    def tensor(array: npt.NDArray[Any], dtype: type) -> Tensor:
        return to_device(torch.from_numpy(array.astype(dtype)), values.device)[:, None]

    start, length = boxes[:, :1].astype(np.float64), boxes[:, 1:].astype(np.float64)
    step = length / target
    width = np.maximum(step, 1)
    centres = start + (np.arange(target) + 0.5) * step  # (B, target)
    first = np.ceil(centres - 2 * width - 0.5)
    result = values.new_zeros(*values.shape[:2], target)
    total = np.zeros_like(centres)
    for offset in range(math.ceil(4 * width.max()) + 1):
        pixels = first + offset
        weights = _cubic(torch.from_numpy(np.abs(pixels + 0.5 - centres) / width)).numpy()
        weights[(pixels < start) | (pixels >= start + length)] = 0
        total += weights
        places = tensor(pixels.clip(0, values.shape[-1] - 1), np.int64).expand(-1, values.shape[1], -1)
        result.addcmul_(values.gather(2, places), tensor(weights, np.float32))
    return result.div_(tensor(total, np.float32))


def resample_weights(boxes: Tensor, source: int, target: int) -> Tensor:
    """Antialiased bicubic weights of one axis, (B, target, source) float32 of `boxes` (B, 2); each row adds up to 1."""
    start, length = boxes[:, 0, None].float(), boxes[:, 1, None].float()
    step = length / target  # source pixels per target pixel
    centres = start + (torch.arange(target, device=boxes.device) + 0.5) * step  # (B, target)
    pixels = torch.arange(source, device=boxes.device) + 0.5
    distance = (pixels - centres[..., None]).div_(step.clamp(min=1)[..., None]).abs_()
    weights = _cubic(distance)
    outside = (pixels < start) | (pixels > start + length)  # (B, source)
    weights.masked_fill_(outside[:, None], 0)
    return weights.div_(weights.sum(-1, keepdim=True))


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.5 at distances x >= 0 (IEEE Trans. ASSP 29, 1981)."""
    near = ((1.5 * x - 2.5) * x).mul_(x).add_(1)
    x = x.clamp(max=2)  # zero from 2 on
    far = ((-0.5 * x + 2.5) * x).sub_(4).mul_(x).add_(2)
    return torch.where(x < 1, near, far)


def mirror(images: Tensor, rows: Tensor) -> Tensor:
    """Mirrors the last spatial axis of some images, (B, *size, C), in place; `rows` (M,) int64 says which of them."""
    bits = images.view(torch.int16) if images.dtype == torch.uint16 else images  # few kernels know uint16
    if bits.device.type == "cpu":  # many times faster than all at once: PyTorch has a kernel for this order of axes
        for row in rows.tolist():
            image = bits[row : row + 1].movedim(-1, 1)
            image.copy_(image.flip(-1))
    else:
        bits[rows] = bits[rows].flip(-2)
    return images


SMALLEST_STD = 1e-6  # a channel that never changes has a smaller deviation, of scaled values
# The stored value of each type that stands for 1, unless data.scale says otherwise.
FULL_SCALE = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}


@dataclass(frozen=True)
class Normalisation:
    """From stored values to the model's input, (value / one - mean) / std, and back; a number for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]  # above 0
    low: tuple[float, ...] | None = None  # the scaled value that is shown black; None: 0
    high: tuple[float, ...] | None = None  # the scaled value that is shown white; None: 1
    scale: dict[str, float] | None = None  # the value that stands for 1 in each type trained on; others: FULL_SCALE
    normalise: str | None = None  # data.normalise; None: "dataset" of older runs, whose values are not clipped

    def one(self, dtype: torch.dtype | np.dtype[Any]) -> float:
        """The stored value that stands for 1."""
        name = str(dtype).removeprefix("torch.")
        return {**FULL_SCALE, **(self.scale or {})}["float32" if name.startswith("float") else name]

    @property
    def limits(self) -> tuple[list[float], list[float]] | None:
        """The scaled values that others are clipped to: the range that is shown, and once its width on either side."""
        if self.normalise != "dataset" or self.low is None or self.high is None:
            return None
        pairs = list(zip(self.low, self.high, strict=True))
        return [2 * low - high for low, high in pairs], [2 * high - low for low, high in pairs]

    @property
    def to_shown(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation, (C,) each: the input times the deviation plus the mean is 0 for black and 1 for white."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        if self.low is None or self.high is None:
            return mean, std
        low, high = torch.tensor(self.low), torch.tensor(self.high)
        return (mean - low) / (high - low), std / (high - low)

    def apply(self, images: Tensor, dtype: torch.dtype | None = None, valid: Tensor | None = None) -> Tensor:
        """Stored values, (B, C, *size), as the model's input.

        `dtype` is the type they were stored in, None: their own. `valid` is as in `Batch`: other pixels become 0.
        """
        return self.on(images.device)(images, dtype, valid)

    def on(self, device: torch.device) -> Normalise:
        """`apply` on a device, whose numbers are there already."""
        mean, std = (torch.tensor(values, device=device) for values in (self.mean, self.std))
        limits = None if self.limits is None else torch.tensor(self.limits, device=device)

        def apply(images: Tensor, dtype: torch.dtype | None = None, valid: Tensor | None = None) -> Tensor:
            one = self.one(dtype or images.dtype)
            if limits is not None:
                low, high = (limits * one).view(2, -1, *(1,) * (images.ndim - 2))
                images = images.float().clamp(low, high)
            elif self.normalise == "sample":
                images = standardised(images.float() * (1 / one), valid) * one
            normalised = normalise(images, mean, std, one)
            return normalised if valid is None else normalised.masked_fill_(~valid, 0)

        return apply

    def shown(self, images: Tensor, valid: Tensor | None = None) -> Tensor:
        """The model's input, (B, C, *size), on the CPU, with 0 for `low` and 1 for `high`; nothing is clamped.

        A pixel that is not `valid`, (B, 1, *size) bool, becomes infinite: pictures leave it transparent.
        """
        shape = (1, -1, *(1,) * (images.ndim - 2))
        mean, std = (item.view(shape) for item in self.to_shown)
        values = images.float().cpu() * std + mean
        return values if valid is None else values.masked_fill(~valid.cpu(), torch.inf)


Normalise = Callable[[Tensor, torch.dtype | None, Tensor | None], Tensor]  # as `Normalisation.apply`


def standardised(images: Tensor, valid: Tensor | None) -> Tensor:
    """Images, (B, C, *size), each channel of each with mean 0 and deviation 1 over its pixels with data."""
    axes = tuple(range(2, images.ndim))
    weights = torch.ones_like(images[:, :1]) if valid is None else valid.float()
    count = weights.sum(axes, keepdim=True).clamp(min=1)
    centred = images - (images * weights).sum(axes, keepdim=True) / count
    variance = (centred.square() * weights).sum(axes, keepdim=True) / count
    return centred / variance.sqrt().clamp(min=SMALLEST_STD)


def normalise(images: Tensor, mean: Tensor, std: Tensor, one: float) -> Tensor:
    """(images / one - mean) / std: (B, C, *size) float32, contiguous; `mean`, `std` (C,); `one` stands for 1."""
    channels = (-1,) + (1,) * (images.ndim - 2)
    floats = images.to(torch.float32, memory_format=torch.contiguous_format)
    return (floats * (1 / (one * std)).view(channels)).sub_((mean / std).view(channels))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. A GPU's copy may still be under way: work that is queued behind it sees it done.

    It comes from pinned memory, which PyTorch keeps until then; from other memory CUDA would wait.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
