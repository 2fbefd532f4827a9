"""Whether held-out images are apart from the training images: the same images, near twins, shared groups."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from os.path import commonprefix
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from torchmae.data.groups import shared_groups
from torchmae.data.items import Image, Progress, tracked
from torchmae.data.reading import map_samples
from torchmae.data.sources import Source, evenly_spaced
from torchmae.errors import ConfigError, DataError

FloatArray = npt.NDArray[np.float32]

MOST = 3000  # images of each set that are looked at
MOST_S = 2.5  # seconds of looking at each set
ALIKE = 0.98  # cosine of two centred thumbnails from which on their images are near twins
_SIDE = {1: 256, 2: 16, 3: 6}  # places of a thumbnail along each axis, by the number of axes
_REDUCED = 32  # a reduced image has at least so many pixels along each axis
_LARGEST = 2**24  # places of an image that is not too slow to look at
_BLOCK = 2**22  # values of an array in memory that become thumbnails at a time
_COMPARED = 64  # held-out images whose pixels are compared with those of training images
_NAMESAKES = 4  # training images that each is compared with
_EXAMPLES = 2


class Twins(NamedTuple):
    """Near twins of training images among the held-out images: as thumbnails, they look the same."""

    number: int = 0
    held_out: int = 0  # images looked at
    train: int = 0
    examples: tuple[tuple[str, str], ...] = ()  # a held-out image and its twin

    def note(self) -> tuple[str, ...]:
        """A sentence where there are any."""
        if not self.number:
            return ()
        shown = ", ".join(" and ".join(pair) for pair in self.examples)
        return (
            f"{self.number:,} of {self.held_out:,} held-out images have a near twin among {self.train:,} training "
            f"images ({shown}): held-out figures are too optimistic; --data.group keeps together what belongs together",
        )


class Apart(NamedTuple):
    """What training and held-out images have in common: sentences, and near twins."""

    notes: tuple[str, ...] = ()
    twins: Twins = Twins()


def check_apart(test: Source, train: Source, what: str, fix: str = "", *, progress: Progress | None = None) -> Apart:
    """Looks for training images among the held-out images, which are called `what`.

    Without a `fix`, the held-out images are a part of the training images' own set, where copies are no mistake.

    Raises:
        ConfigError: all held-out images are training images, wherever they lie and whatever they are called.
    """
    rows, thumbnails = thumbnails_of(test, progress)
    others, bank = thumbnails_of(train, progress)
    found = nearest_twins(thumbnails, bank)
    twin_of = {int(rows[i]): int(others[j]) for i, j in found}
    share = training_share(test, train, twin_of) if fix else 0.0
    if share == 1:
        raise ConfigError(f"{what} leads to the training images", f"choose {fix}")
    same = (f"about {share:.0%} of the images of {what} are training images too: figures flatter",) if share else ()
    examples = tuple((test.name(i), train.name(j)) for i, j in [*twin_of.items()][:_EXAMPLES])
    twins = Twins(len(found), len(rows), len(others), examples)
    return Apart((*same, *twins.note(), *shared_groups(train, test)), twins)


def training_share(test: Source, train: Source, twin_of: dict[int, int]) -> float:
    """Share of held-out images whose pixels are those of a training image, as far as 64 of them show.

    Each is compared with its twin, and with images of the same file name (or number in an array).
    """
    looked_for = {int(i): test.name(int(i)) for i in evenly_spaced(len(test), _COMPARED)}
    namesakes: dict[str, list[int]] = {name.rpartition("/")[2]: [] for name in looked_for.values()}
    for i in range(len(train)):
        last = train.name(i).rpartition("/")[2]
        if last in namesakes:
            namesakes[last].append(i)

    def is_same(index: int, i: int) -> bool:
        with suppress(DataError):
            return np.array_equal(test.read(index), train.read(i))
        return False

    found = 0
    for index, name in looked_for.items():
        alike = namesakes[name.rpartition("/")[2]]
        alike.sort(key=lambda i: -len(commonprefix([name[::-1], train.name(i)[::-1]])))  # noqa: RUF071
        candidates = [*([twin_of[index]] if index in twin_of else []), *alike[:_NAMESAKES]]
        found += any(is_same(index, i) for i in candidates)
    return found / len(looked_for)


def nearest_twins(thumbnails: FloatArray, bank: FloatArray) -> list[tuple[int, int]]:
    """Pairs of a thumbnail, (M, D), and the one of a bank, (N, D), that is most like it, where these are twins."""
    if not len(thumbnails) or not len(bank) or thumbnails.shape[1] != bank.shape[1]:
        return []
    mean = bank.mean(0)

    def directions(values: FloatArray) -> FloatArray:
        centred = values - mean
        centred -= centred.mean(1, keepdims=True)  # of another brightness all the same
        centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
        centred[np.ptp(values, axis=1) == 0] = 0  # blank images look alike and say nothing
        return centred

    cosines = directions(thumbnails) @ directions(bank).T
    best = cosines.argmax(1)
    return [(int(i), int(best[i])) for i in np.flatnonzero(cosines.max(1) >= ALIKE)]


def thumbnails_of(source: Source, progress: Progress | None = None) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Thumbnails of at most `MOST` images, (M, D), and which images these are; fewer after `MOST_S` seconds.

    Images that cannot be read, are very large, or have another number of axes than most are left out.
    """
    rows = evenly_spaced(len(source), MOST)
    end = time.monotonic() + MOST_S
    found: list[tuple[int, FloatArray]] = []
    for row, thumbnail in zip(rows.tolist(), _each(source, rows, end, progress), strict=False):
        found += [] if thumbnail is None else [(row, thumbnail)]
        if time.monotonic() > end:
            break
    sizes = Counter(len(thumbnail) for _, thumbnail in found)
    size = sizes.most_common(1)[0][0] if sizes else 0
    kept = [(row, thumbnail) for row, thumbnail in found if len(thumbnail) == size]
    values = np.array([thumbnail for _, thumbnail in kept], dtype=np.float32)
    return np.array([row for row, _ in kept], dtype=np.int64), values.reshape(len(kept), size)


def _each(
    source: Source, rows: npt.NDArray[np.int64], end: float, progress: Progress | None
) -> Iterator[FloatArray | None]:
    """A thumbnail of each image, or None; nothing is read after the time `end`."""
    whole = source.whole()
    if whole is None:
        looks = map_samples(source, rows, partial(_look, source, end=end))
        yield from tracked(looks, progress, "looking for twins", len(rows))
        return
    images, places = whole
    for block in np.array_split(rows, max(1, min(len(rows), len(rows) * math.prod(images.shape[1:]) // _BLOCK))):
        yield from _thumbnails(images[block if places is None else places[block]])


def _look(source: Source, index: int, end: float) -> FloatArray | None:
    if time.monotonic() > end:
        return None
    with suppress(DataError):
        item = source.open(index)
        reduction = next((factor for factor in (8, 4, 2) if min(item.size) >= factor * _REDUCED), 1)
        if item.reduces or math.prod(item.size) <= _LARGEST:
            return _thumbnails(item.read(None, reduction if item.reduces else 1)[None])[0]
    return None


def _thumbnails(images: Image) -> FloatArray:
    """Images, (N, *size, C), as (N, D) means of their channels and of the pixels around D places."""
    with np.errstate(all="ignore"):  # of values that are not finite
        values = images.mean(-1, dtype=np.float32)
        side = _SIDE[values.ndim - 1]
        for axis, length in enumerate(values.shape[1:], 1):
            starts = np.arange(side) * length // side
            counts = np.maximum(np.diff([*starts, length]), 1).astype(np.float32)
            shape = [side if i == axis else 1 for i in range(values.ndim)]
            values = np.add.reduceat(values, starts, axis=axis) / counts.reshape(shape)
    return np.nan_to_num(values.reshape(len(values), -1), posinf=0, neginf=0)
