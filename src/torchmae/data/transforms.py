"""Crops, flips, resampling and normalisation: functions of given random numbers, for 1 to 3 spatial dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Boxes = npt.NDArray[np.int64]

_TRIES = 10
_LONG = 2**21  # pixels times target pixels of an axis, above which a matrix is not worth its zeros
_MAX_WEIGHTS = 2**24  # of one axis at a time: 64 MB, and a few times that in passing
CROP_NUMBERS = 2 * _TRIES + 2
"""Random numbers that `crop_boxes` takes for each sample: area and aspect of ten tries, and a place on two axes."""


def crop_boxes(
    u: npt.NDArray[np.float32],
    size: tuple[int, ...],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    target: tuple[int, ...],
) -> Boxes:
    """Random crops of images of one size.

    In 2-D, torchvision's RandomResizedCrop: ten tries at an area and an aspect ratio (log-uniform), the first box
    that fits is placed at random; when none fits, the largest centred box whose aspect is allowed. Unlike there, the
    aspect ratio (width / height) is relative to the target's, so that images for an input that is not square are
    not squashed on average, and a scale of (1, 1) takes the centred box at once.

    In 1-D and 3-D there is no one aspect: every axis keeps the same share, size * area ** (1 / n), and `ratio` is
    not used.

    Args:
        u: (B, CROP_NUMBERS) uniform in [0, 1).
        size: spatial size of the images, 1 to 3 numbers.
        scale: smallest and largest share of the image's area (length, volume), in (0, 1].
        ratio: smallest and largest aspect ratio relative to the target's.
        target: spatial size that the crop will be resampled to.

    Returns:
        (B, n, 2) boxes: start and length in pixels on each axis, inside the image.
    """
    numbers = u.astype(np.float64)
    if len(size) == 2:
        aspect = target[1] / target[0]
        extremes = ratio[0] * aspect, ratio[1] * aspect
        if len(u) == 1:
            return np.array([_crop_box(numbers[0].tolist(), (size[0], size[1]), scale, extremes)])
        lengths = _tried_lengths(numbers, (size[0], size[1]), scale, extremes)
        centred = lengths.min(axis=1) == 0
        lengths[centred] = _centred_lengths((size[0], size[1]), extremes)
    else:
        share = (scale[0] + (scale[1] - scale[0]) * numbers[:, :1]) ** (1 / len(size))
        lengths = np.clip(np.rint(np.array(size) * share), 1, size).astype(np.int64)
        centred = np.zeros(len(u), dtype=bool)
    free = np.array(size) - lengths  # (B, n)
    placed = np.floor(numbers[:, -len(size) :] * (free + 1)).astype(np.int64)
    starts = np.where(centred[:, None], free // 2, placed)
    return np.stack([starts, lengths], axis=-1)


def _crop_box(
    u: list[float], size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> list[tuple[int, int]]:
    """`crop_boxes` of one picture, number for number: for so little, NumPy's calls take longer than the arithmetic."""
    height, width = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for share, shape in zip(u[:_TRIES], u[_TRIES : 2 * _TRIES], strict=True) if scale[0] < 1 else ():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = float(np.exp(low + (high - low) * shape))  # math.exp may differ in the last bit
        lengths = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 1 <= lengths[0] <= height and 1 <= lengths[1] <= width:
            starts = (int(place * (have - want + 1)) for place, have, want in zip(u[-2:], size, lengths, strict=True))
            return list(zip(starts, lengths, strict=True))
    lengths = _centred_lengths(size, ratio)
    return [((have - want) // 2, want) for have, want in zip(size, lengths, strict=True)]


def _tried_lengths(
    u: npt.NDArray[np.float64], size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> Boxes:
    """(B, 2) height and width of the first try that fits, zeros where none does."""
    found = np.zeros((len(u), 2), dtype=np.int64)
    waiting = np.arange(len(u))  # for a try that fits: nearly all find one at first
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for i in range(_TRIES if scale[0] < 1 else 0):
        area = size[0] * size[1] * (scale[0] + (scale[1] - scale[0]) * u[waiting, i])
        aspect = np.exp(low + (high - low) * u[waiting, _TRIES + i])
        lengths = np.stack([np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))], axis=-1)
        fits = (lengths.min(axis=1) >= 1) & (lengths <= size).all(axis=1)
        found[waiting[fits]] = lengths[fits]
        waiting = waiting[~fits]
    return found


def _centred_lengths(size: tuple[int, int], ratio: tuple[float, float]) -> tuple[int, int]:
    """Height and width of the largest box whose width / height lies within `ratio`."""
    height, width = size
    aspect = min(max(width / height, ratio[0]), ratio[1])
    return max(1, min(height, round(width / aspect))), max(1, min(width, round(height * aspect)))


def eval_box(size: tuple[int, ...], target: tuple[int, ...]) -> Boxes:
    """The largest centred box with the target's proportions: (n, 2) start and length on each axis."""
    factor = min(have / want for have, want in zip(size, target, strict=True))
    lengths = np.clip(np.rint(np.array(target) * factor), 1, size).astype(np.int64)
    return np.stack([(np.array(size) - lengths) // 2, lengths], axis=-1)


def reduction(boxes: Boxes, target: tuple[int, ...]) -> int:
    """The largest of 1, 2, 4 and 8 that images may be divided by before boxes are cut out and resampled to `target`.

    Every box keeps one and a half times the target's pixels along each axis. Measured on photographs, decoding at
    1/2 and 1/4 then moves a resampled crop by 0.4% of full scale in the mean, 1% at most; down to the target's own
    pixels it would be 1% and 2.4%.

    Args:
        boxes: (B, n, 2), start and length in pixels on each axis.
        target: spatial size of the result.
    """
    room = min(length / wanted for box in boxes.tolist() for (_, length), wanted in zip(box, target, strict=True))
    return next((factor for factor in (8, 4, 2) if room >= 1.5 * factor), 1)


def resample(images: Tensor, boxes: Boxes, target: tuple[int, ...], flip: npt.NDArray[np.bool_]) -> Tensor:
    """Cuts a box out of each image and resamples it: separable, antialiased bicubic (a = -0.5, as in Pillow).

    Only pixels inside the box contribute. One weight matrix per image and axis, applied by one batched product per
    axis; a flip is the reversed matrix of the last axis. Along an axis so long that most of the matrix would be zeros,
    only the pixels that count are taken (`resample_long`).

    Args:
        images: (B, C, *size), 1 to 3 spatial dimensions, floats or unsigned integers, on any device.
        boxes: (B, n, 2), start and length in pixels on each axis.
        target: spatial size of the result.
        flip: (B,) whether to mirror the last axis.

    Returns:
        (B, C, *target) float32; of integer images rounded and clamped to their range, as if stored in between.
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
        if products[axis] > _LONG:
            columns = resample_long(resampled.flatten(1, -2), boxes[:, axis], target[axis])  # (B, rest, target)
            if axis == len(size) - 1:
                columns = torch.where(mirrored, columns.flip(-1), columns)
            resampled = columns.transpose(1, 2).reshape(batch, target[axis], *resampled.shape[1:-1])
            continue
        weights = resample_weights(box_tensor[:, axis], size[axis], target[axis])  # (B, target, source)
        if axis == len(size) - 1:
            weights = torch.where(mirrored, weights.flip(1), weights)
        # The axis in hand is the last; the product moves it to the front, which brings the next one to the end.
        rest = resampled.shape[1:-1]
        columns = resampled.reshape(batch, math.prod(rest), size[axis]).transpose(1, 2)
        resampled = torch.bmm(weights, columns).reshape(batch, target[axis], *rest)
    resampled = resampled.movedim(-1, 1).contiguous()  # every axis has moved in front of the channels
    if images.is_floating_point():
        return resampled
    return resampled.round_().clamp_(0, torch.iinfo(images.dtype).max)


def resample_long(values: Tensor, boxes: Boxes, target: int) -> Tensor:
    """What `resample` does along one axis, without a matrix: a pass for each of the pixels that a target pixel takes.

    Args:
        values: (B, rows, length) float32, on any device.
        boxes: (B, 2), start and length of the box in pixels.
        target: pixels wanted.

    Returns:
        (B, rows, target) float32.
    """
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
        places = to_device(torch.from_numpy(pixels.clip(0, values.shape[-1] - 1).astype(np.int64)), values.device)
        taken = values.gather(2, places[:, None].expand(-1, values.shape[1], -1))
        result.addcmul_(taken, to_device(torch.from_numpy(weights.astype(np.float32)), values.device)[:, None])
    return result.div_(to_device(torch.from_numpy(total.astype(np.float32)), values.device)[:, None])


def resample_weights(boxes: Tensor, source: int, target: int) -> Tensor:
    """Antialiased bicubic weights of one axis, each row taking the source pixels of one target pixel.

    Args:
        boxes: (B, 2) int64, start and length in pixels.
        source: pixels along the axis.
        target: pixels wanted.

    Returns:
        (B, target, source) float32, each row adding up to 1, zero outside the box.
    """
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
    """Mirrors the last spatial axis of some images, in place.

    Args:
        images: (B, *size, C).
        rows: (M,) int64, which of them.

    Returns:
        `images`.
    """
    bits = images.view(torch.int16) if images.dtype == torch.uint16 else images  # few kernels know uint16
    if bits.device.type == "cpu":  # many times faster than all at once: PyTorch has a kernel for this order of axes
        for row in rows.tolist():
            image = bits[row : row + 1].movedim(-1, 1)
            image.copy_(image.flip(-1))
    else:
        bits[rows] = bits[rows].flip(-2)
    return images


FULL_SCALE = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}
"""The value of each type of stored values that stands for 1, unless data.scale says otherwise."""


@dataclass(frozen=True)
class Normalisation:
    """From stored values to the model's input, and back to what can be looked at and measured.

    A stored value is divided by the number that stands for 1 in its type; then `mean` is subtracted, and the rest is
    divided by `std`.

    Attributes:
        mean: one for each channel, of scaled values.
        std: likewise, above 0.
        low: the scaled value that is shown black, one for each channel; None: 0.
        high: the one that is shown white; None: 1.
        scale: what stands for 1 in each type of stored values that the model was trained on; of other types, and where
            it is None, FULL_SCALE says.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    scale: dict[str, float] | None = None

    def one(self, dtype: torch.dtype | np.dtype[Any]) -> float:
        """The stored value that stands for 1."""
        name = str(dtype).removeprefix("torch.")
        return {**FULL_SCALE, **(self.scale or {})}["float32" if name.startswith("float") else name]

    def apply(self, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Stored values, (B, C, *size), as the model takes them: float32, contiguous, on the same device.

        Args:
            images: any type.
            dtype: that they were stored in; None: their own.
        """
        mean, std = (torch.tensor(values, device=images.device) for values in (self.mean, self.std))
        return normalise(images, mean, std, self.one(dtype or images.dtype))

    def shown(self, images: Tensor) -> Tensor:
        """The model's input, (B, C, *size), on the CPU, with 0 for `low` and 1 for `high`; nothing is clamped."""
        shape = (1, -1, *(1,) * (images.ndim - 2))
        mean, std = (torch.tensor(values).view(shape) for values in (self.mean, self.std))
        values = images.float().cpu() * std + mean
        if self.low is None or self.high is None:
            return values
        low, high = (torch.tensor(ends).view(shape) for ends in (self.low, self.high))
        return (values - low) / (high - low)


def normalise(images: Tensor, mean: Tensor, std: Tensor, one: float) -> Tensor:
    """(images / one - mean) / std.

    Args:
        images: (B, C, *size).
        mean: (C,), of scaled values.
        std: (C,), of scaled values, above 0.
        one: the stored value that stands for 1.

    Returns:
        (B, C, *size) float32, contiguous whatever `images` is.
    """
    channels = (-1,) + (1,) * (images.ndim - 2)
    floats = images.to(torch.float32, memory_format=torch.contiguous_format)
    return (floats * (1 / (one * std)).view(channels)).sub_((mean / std).view(channels))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. A GPU's copy may still be under way: work that is queued behind it sees it done.

    It comes from pinned memory, which PyTorch keeps until then; from other memory CUDA would wait for the work before
    it, and other devices might read what has been freed.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
