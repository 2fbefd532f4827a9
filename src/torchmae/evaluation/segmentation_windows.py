"""Windows of the model's input size: cut out of pictures and their masks, and put together to one map of classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torchmae.data.items import Valid
from torchmae.data.loader import mixed_subset
from torchmae.data.transforms import resample, resample_valid
from torchmae.errors import DataError
from torchmae.evaluation.images import ImageSet
from torchmae.evaluation.segmentation_data import IGNORED, ClassMap, ClassMaps, Pairs
from torchmae.machine import bytes_to_keep

OVERLAP = 0.25  # of windows of a test picture
_SKIPPED = -100  # the label that PyTorch's cross-entropy leaves out

Segment = Callable[[Tensor, Tensor | None], Tensor]
"""Windows (B, C, h, w), and where they hold data (B, 1, h, w), None: everywhere, to logits (B, K, h, w)."""


class Window(NamedTuple):
    """A place in a picture, of the size of the model's input: the picture's number, and its upper left corner."""

    picture: int
    top: int
    left: int


def targets(labels: Tensor) -> Tensor:
    """Classes as cross-entropy takes them: int64."""
    return labels.long().masked_fill_(labels == IGNORED, _SKIPPED)


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """(B, K, h, w) to (B, K, *size), bilinear."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def evenly_placed(length: int, window: int, overlap: float) -> list[int]:
    """Where windows begin that cover `length` pixels, evenly spaced; a share of `overlap` or more lies in two."""
    count = 1 + math.ceil((length - window) / (window * (1 - overlap)))
    return np.linspace(0, length - window, count).round().astype(int).tolist()


def enlarged(size: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    """The size of a picture in which the window fits: its own, or one in its proportions."""
    factor = max(1.0, *(wanted / have for wanted, have in zip(window, size, strict=True)))
    return tuple(max(wanted, round(have * factor)) for wanted, have in zip(window, size, strict=True))


def windows_of(picture: int, size: Sequence[int], window: Sequence[int], overlap: float = 0.0) -> list[Window]:
    """The windows that cover a picture of `size`, once it is `enlarged`; `overlap` as of `evenly_placed`."""
    sides = zip(enlarged(size, window), window, strict=True)
    places = [evenly_placed(have, wanted, overlap) for have, wanted in sides]
    return [Window(picture, top, left) for top, left in product(*places)]


def training_windows(images: ImageSet, window_bytes: int, memory_limit: float) -> tuple[list[Window], tuple[str, ...]]:
    """The windows of all training pictures, or a mixed part that fits `memory_limit` GiB, and a note on that."""
    pairs = images.source
    assert isinstance(pairs, Pairs)
    windows = [window for i, size in enumerate(pairs.sizes) for window in windows_of(i, size, images.model.input_size)]
    count = max(1, int(bytes_to_keep(memory_limit) / window_bytes))
    if count >= len(windows):
        return windows, ()
    chosen = np.sort(mixed_subset(len(windows), count))
    note = f"learned from {count:,} of {len(windows):,} training windows, which fit segmentation.memory_limit"
    return [windows[row] for row in chosen], (note,)


class Picture(NamedTuple):
    """A picture, `enlarged`, and which of its pixels hold data; None: all."""

    values: Tensor  # (1, C, H, W) float32, as stored
    dtype: torch.dtype  # in which they were stored
    valid: Tensor | None  # (1, 1, H, W) bool
    own: Valid | None  # (h, w) bool, in the picture's own size

    def part(self, rows: slice, columns: slice) -> Picture:
        """A window of the picture, without `own`."""
        place = (slice(None), slice(None), rows, columns)
        valid = None if self.valid is None else self.valid[place]
        return Picture(self.values[place], self.dtype, valid, None)


def read_picture(images: ImageSet, index: int) -> Picture | None:
    """Reads a picture of a set. None: it is unreadable, which the set's `bad` then counts."""
    try:
        values, own = images.source.open(index).read_valid()
    except DataError as error:
        images.bad.add(images.source.name(index), error.problem)
        return None
    stored = torch.from_numpy(values).movedim(-1, 0)[None]
    box = np.array([[[0, length] for length in stored.shape[2:]]])
    size, flip = enlarged(stored.shape[2:], images.model.input_size), np.array([False])
    if own is None:
        return Picture(resample(stored, box, size, flip), stored.dtype, None, None)
    resized, valid = resample_valid(stored, torch.from_numpy(own)[None, None], box, size, flip)
    return Picture(resized.float(), stored.dtype, valid, own)


def stretched(classes: ClassMap, size: Sequence[int]) -> ClassMap:
    """A map of classes in another size: each pixel takes the class of the nearest."""
    rows, columns = (np.arange(wanted) * have // wanted for wanted, have in zip(size, classes.shape, strict=True))
    return classes[rows][:, columns]


def cut_windows(images: ImageSet, maps: ClassMaps, windows: Sequence[Window]) -> Iterator[tuple[Picture, Tensor]]:
    """Cuts out each window and its classes, (h, w) uint8; a pixel without data has the class `IGNORED`.

    Of a picture that cannot be read, zeros that count nowhere. Windows of one picture follow each other.
    """
    pairs, (height, width) = images.source, images.model.input_size
    assert isinstance(pairs, Pairs)
    blank = Picture(torch.zeros(1, len(images.normalisation.mean), height, width), torch.float32, None, None)
    last = -1
    for window in windows:
        if window.picture != last:
            last, picture = window.picture, read_picture(images, window.picture)
            if picture is not None:
                classes = torch.from_numpy(stretched(maps.read(pairs.files[last]), picture.values.shape[2:]))
                if picture.valid is not None:
                    classes = classes.masked_fill(~picture.valid[0, 0], IGNORED)
        if picture is None:
            yield blank, torch.full((height, width), IGNORED, dtype=torch.uint8)
            continue
        rows, columns = slice(window.top, window.top + height), slice(window.left, window.left + width)
        yield picture.part(rows, columns), classes[rows, columns]


def inputs_of(images: ImageSet, parts: Sequence[Picture]) -> tuple[Tensor, Tensor | None]:
    """Windows as the model's input, (B, C, h, w), 0 where there is no data, and (B, 1, h, w) where there is."""
    inputs = torch.cat([images.normalisation.apply(part.values, part.dtype, part.valid) for part in parts])
    if all(part.valid is None for part in parts):
        return inputs, None
    full = torch.ones(1, 1, *inputs.shape[2:], dtype=torch.bool)
    return inputs, torch.cat([full if part.valid is None else part.valid for part in parts])


def window_batches(
    images: ImageSet, maps: ClassMaps, windows: Sequence[Window]
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Batches of windows: the input and where it holds data, as of `inputs_of`, and classes, (B, h, w) uint8."""
    parts, labels = [], []
    for number, (part, classes) in enumerate(cut_windows(images, maps, windows), 1):
        parts.append(part)
        labels.append(classes)
        if len(parts) == images.model.batch_size or number == len(windows):
            yield *inputs_of(images, parts), torch.stack(labels)
            parts, labels = [], []


@torch.no_grad()
def segmented(
    images: ImageSet, index: int, shape: tuple[int, ...], segment: Segment, device: torch.device
) -> ClassMap | None:
    """The likeliest class of each pixel of a picture, in its own `shape`; None where it cannot be read.

    `IGNORED` where it holds no data. Logits of windows that overlap are averaged.
    """
    picture = read_picture(images, index)
    if picture is None:
        return None
    size, (height, width) = picture.values.shape[2:], images.model.input_size
    windows = windows_of(index, shape, images.model.input_size, OVERLAP)
    total, times = None, torch.zeros(size)
    for start in range(0, len(windows), images.model.batch_size):
        part = windows[start : start + images.model.batch_size]
        places = [(slice(w.top, w.top + height), slice(w.left, w.left + width)) for w in part]
        inputs, valid = inputs_of(images, [picture.part(*place) for place in places])
        logits = segment(inputs.to(device), None if valid is None else valid.to(device)).float().cpu()
        total = torch.zeros(logits.shape[1], *size) if total is None else total
        for place, values in zip(places, logits, strict=True):
            total[:, *place] += values
            times[place] += 1
    assert total is not None
    found: ClassMap = upsample((total / times)[None], shape)[0].argmax(0).numpy().astype(np.uint8)
    if picture.own is not None:
        found[~picture.own] = IGNORED
    return found
