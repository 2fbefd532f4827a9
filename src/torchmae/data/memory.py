"""Images held in memory, as the integers they were stored in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchmae.data.decode import BadFiles
from torchmae.data.reading import Progress, Reading, read_many, read_or_next
from torchmae.data.sources import ArraySource, Labels, Source, Subset
from torchmae.data.transfer import to_device

_GIB = 2**30


class DoesNotFitError(Exception):
    """Why images cannot be held in memory."""


@dataclass(frozen=True)
class Held:
    """All images of a source.

    Attributes:
        images: (M, C, *size), uint8, uint16 or float32; on the CPU, unless they were moved.
        rows: (N,) the row of each image; None: they are in order.
        labels: (N,), None where nothing has a label. The label of an unreadable image is its stand-in's.
    """

    images: Tensor
    rows: npt.NDArray[np.int64] | None
    labels: Labels | None

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.images.nbytes

    def gather(self, indices: npt.NDArray[np.int64]) -> Tensor:
        """(B, C, *size) copies of some images."""
        rows = indices if self.rows is None else self.rows[indices]
        chosen = to_device(torch.from_numpy(rows), self.images.device)
        if self.images.dtype == torch.uint16:  # few kernels know it: CUDA's for this one does not
            return self.images.view(torch.int16)[chosen].view(torch.uint16)
        return self.images[chosen]


def hold(source: Source, limit: float, bad: BadFiles, progress: Progress | None = None) -> Held:
    """Brings all images of a source into memory; an array that is there already is not copied.

    Args:
        source: the images.
        limit: bytes that they may take.
        bad: takes the ones that cannot be read; their neighbours stand in for them.
        progress: told how far it is.

    Raises:
        DoesNotFitError: more than `limit`, or images of different sizes or types; found at the first that differs.
        DataError: more bad ones than `bad` allows.
    """
    base = source.source if isinstance(source, Subset) else source
    if isinstance(base, ArraySource) and _usable(base.images):
        _check_limit(base.images.nbytes, limit)
        rows = source.indices if isinstance(source, Subset) else None
        return Held(torch.from_numpy(base.images).movedim(-1, 1), rows, source.labels)
    return _decode_all(source, limit, bad, progress)


def _usable(images: npt.NDArray[Any]) -> bool:
    """Whether PyTorch can use an array's memory as it is."""
    return images.dtype in (np.uint8, np.uint16, np.float32) and images.flags.writeable


def _check_limit(nbytes: int, limit: float) -> None:
    if nbytes > limit:
        raise DoesNotFitError(
            f"the images take {nbytes / _GIB:.1f} GiB and data.memory_limit leaves {limit / _GIB:.1f}"
        )


def _decode_all(source: Source, limit: float, bad: BadFiles, progress: Progress | None) -> Held:
    first_bad: list[tuple[str, str]] = []
    first, image = read_or_next(source, 0, first_bad)
    _check_limit(image.nbytes * len(source), limit)
    held = np.empty((len(source), image.shape[-1], *image.shape[:-1]), dtype=image.dtype)
    labels = None if source.labels is None else source.labels.copy()
    for reading in read_many(source, np.arange(len(source))):
        for name, reason in reading.bad:
            bad.add(name, reason)
        if reading.image.shape != image.shape or reading.image.dtype != image.dtype:
            raise DoesNotFitError(_difference(source, Reading(first, first, image, []), reading))
        held[reading.asked] = np.moveaxis(reading.image, -1, 0)
        if labels is not None and source.labels is not None:
            labels[reading.asked] = source.labels[reading.read]
        done = reading.asked + 1
        if progress is not None and (done % 1000 == 0 or done == len(source)):
            progress("reading images", done, len(source))
    return Held(torch.from_numpy(held), None, labels)


def _difference(source: Source, one: Reading, other: Reading) -> str:
    what = [
        f"{source.name(item.read)} is {'x'.join(map(str, item.image.shape))} {item.image.dtype}"
        for item in (one, other)
    ]
    return f"the images differ: {what[0]}, {what[1]}"
