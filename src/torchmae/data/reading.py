"""Reading many images: past those that are unreadable, in threads, and what a sample of them looks like."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from torchmae.data.formats import CUT_SHORT, NOT_FINITE, Image, Item, Progress, quiet_pillow
from torchmae.data.sources import Source, spread
from torchmae.errors import ConfigError, DataError

Result = TypeVar("Result")

MAX_MISSES = 64
"""Unreadable images in a row after which a source counts as gone (a disk that went away, say)."""

MAX_READERS = 8
"""Reader processes that are started unasked."""

_AHEAD = 8  # images per thread that are decoded before they are asked for
_ANNOUNCED = 256  # images at a time that a source is told of
_WORTH_THREADS = 128 * 128 * 3  # values in an image


_MENDS = {
    NOT_FINITE: "nodata nan puts the mean in such places",
    CUT_SHORT: "truncated keep takes the rows that are there",
}
"""By what the reason begins with, the option that makes bad files good ones."""


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BadFiles:
    """The files that could not be read, each once, up to the share that the user allows.

    Args:
        total: how many files there are.
        max_bad: share of them that may be unreadable, in [0, 1]; 0: none, else one at least.
        option: what the user calls that share.
    """

    def __init__(self, total: int, max_bad: float, option: str = "data.max_bad") -> None:
        self.total = total
        self.max_bad = max_bad
        self.option = option
        self.limit = max(1, int(max_bad * total)) if max_bad > 0 else 0
        self._reasons: dict[str, str] = {}

    @property
    def items(self) -> list[tuple[str, str]]:
        """(name, reason) of every bad file, in the order they were met."""
        return list(self._reasons.items())

    def add(self, name: str, reason: str) -> None:
        """Counts a bad file; one that is known already is not counted again.

        Raises:
            DataError: there are now more than the limit.
        """
        self._reasons[name] = reason
        if len(self._reasons) > self.limit:
            allowed = f"more than {self.option} {self.max_bad:g} allows" if self.max_bad else f"and {self.option} is 0"
            raise DataError(
                f"{len(self._reasons)} of {self.total} images cannot be read, {allowed}; the last: {name}: {reason}",
                self._fix(reason),
            )

    def _fix(self, reason: str) -> str:
        """What to do about the bad files, of which the last one was so for this reason."""
        group = self.option.rpartition("max_bad")[0]
        first = next((f"--{group}{text}, or " for begin, text in _MENDS.items() if reason.startswith(begin)), "")
        return f"{first}mend or remove them, or raise {self.option}"


def reader_processes(asked: int | None, sharing: int = 1) -> int:
    """How many processes read images: as many as asked for, else one for each core, or each of the share that one of
    `sharing` processes has; then at most MAX_READERS."""
    return max(1, min(MAX_READERS, num_cores() // sharing)) if asked is None else asked


def read_or_next(source: Source, index: int, bad: list[tuple[str, str]]) -> tuple[int, Image]:
    """`first_readable`, of whole images."""
    return first_readable(source, index, bad, source.read)


def first_readable(
    source: Source, index: int, bad: list[tuple[str, str]], read: Callable[[int], Result]
) -> tuple[int, Result]:
    """What `read` makes of the image at `index` or, where it cannot be read, of the next one that can.

    After the last image comes the first.

    Args:
        source: the images.
        index: which one.
        bad: takes (name, reason) of what could not be read.
        read: takes an index; raises DataError.

    Returns:
        the index that was read, and what came of it.

    Raises:
        DataError: MAX_MISSES in a row cannot be read.
    """
    attempts, fix = min(len(source), MAX_MISSES), ""
    for candidate in range(index, index + attempts):
        candidate %= len(source)
        try:
            return candidate, read(candidate)
        except DataError as error:
            name = source.name(candidate)
            bad.append((name, error.problem.removeprefix(f"{name}: ")))
            fix = error.fix
    name, reason = bad[-1]
    raise DataError(f"{attempts} images in a row cannot be read; the last: {name}: {reason}", fix or "check the data")


def stand_ins(source: Source, readable: npt.NDArray[np.bool_], reason: str, bad: BadFiles) -> npt.NDArray[np.int64]:
    """(N,) the index that is read in place of each: itself, or the next that is readable; after the last the first.

    Args:
        source: the samples.
        readable: (N,) which of them are; not none.
        reason: why the others are not.
        bad: takes those.

    Raises:
        DataError: more of them than `bad` allows.
    """
    for index in np.flatnonzero(~readable):
        bad.add(source.name(int(index)), reason)
    good = np.flatnonzero(readable)
    return good[np.searchsorted(good, np.arange(len(readable))) % len(good)]


class Reading(NamedTuple):
    """One image of many.

    Attributes:
        asked: which one was asked for.
        read: which one it is: another where that one cannot be read.
        image: (*size, C).
        bad: name and reason of the ones that could not be read.
    """

    asked: int
    read: int
    image: Image
    bad: list[tuple[str, str]]


def read_many(source: Source, indices: npt.NDArray[np.int64]) -> Iterator[Reading]:
    """Reads images in the order of `indices`, on several threads where that pays.

    Raises:
        DataError: MAX_MISSES in a row cannot be read.
    """

    def read_one(index: np.int64) -> Reading:
        bad: list[tuple[str, str]] = []
        return Reading(int(index), *read_or_next(source, int(index), bad), bad)

    wanted = _announced(source, indices)
    first = read_one(next(wanted))
    yield first
    threads = num_cores()
    # Only the decoding proper leaves Python's lock; of a small image that is so little that threads get in each
    # other's way.
    if threads == 1 or first.image.size < _WORTH_THREADS:
        yield from map(read_one, wanted)
        return
    with ThreadPoolExecutor(threads) as pool:
        while part := list(islice(wanted, threads * _AHEAD)):
            with quiet_pillow():
                readings = list(pool.map(read_one, part))
            yield from readings


def _announced(source: Source, indices: npt.NDArray[np.int64]) -> Iterator[np.int64]:
    """The same indices; the source is told of each some time before it is its turn."""
    for start in range(0, len(indices), _ANNOUNCED):
        part = indices[start : start + _ANNOUNCED]
        source.read_ahead(part)
        yield from part


@dataclass(frozen=True)
class Probe:
    """What a sample of a source looks like.

    Attributes:
        channels: 3 where some samples are grey and the rest in colour; else what most have.
        sizes: the spatial sizes seen.
        notes: what was decided about the samples, a short phrase each.
    """

    channels: int
    sizes: frozenset[tuple[int, ...]]
    notes: tuple[str, ...]


def probe(source: Source, sample: int = 64) -> Probe:
    """Opens samples evenly spread over a source; unreadable ones are passed over.

    Raises:
        DataError: none of them can be read.
    """
    items: list[Item] = []
    failure: DataError | None = None
    for index in spread(len(source), sample):
        try:
            items.append(source.open(int(index)))
        except DataError as error:
            failure = DataError(f"{source.name(int(index))}: {error.problem}", error.fix)
    if not items:
        assert failure is not None
        raise DataError(
            f"none of {min(sample, len(source))} images can be read; the last: {failure.problem}",
            failure.fix or "check the data",
        )
    counts = Counter(item.channels for item in items)
    notes = Counter(note for item in items for note in item.notes)
    return Probe(
        channels=3 if set(counts) == {1, 3} else counts.most_common(1)[0][0],
        sizes=frozenset(item.size for item in items),
        notes=tuple(notes),
    )


def fit_channels(source: Source, seen: Probe, channels: int) -> Source:
    """The samples with a model's number of channels; ConfigError where they have another and cannot be converted."""
    if channels != seen.channels and {channels, seen.channels} != {1, 3}:
        raise ConfigError(
            f"the images have {seen.channels} channels ({source.name(0)}) and the model takes {channels}",
            f"set model.in_chans to {seen.channels}, or give images that have {channels}",
        )
    return source.with_channels(channels)


def statistics(
    source: Source, sample: int = 2000, progress: Progress | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, on integers scaled to [0, 1] and floats as they are.

    Every image of an evenly spread sample counts alike, whatever its size. A channel that never changes gets a
    deviation of 1, so that normalising leaves it at 0.

    Args:
        source: images with one number of channels.
        sample: how many to read, at most.
        progress: told how far it is.

    Returns:
        means and deviations, one for each channel.

    Raises:
        DataError: the images hold values that are not finite, or cannot be read.
    """
    indices = spread(len(source), sample)
    first: list[npt.NDArray[np.float64]] = []
    second: list[npt.NDArray[np.float64]] = []
    for reading in read_many(source, indices):
        image = reading.image
        scale = 1.0 if image.dtype.kind == "f" else 1.0 / np.iinfo(image.dtype).max
        values = image.reshape(-1, image.shape[-1]).astype(np.float64) * scale
        first.append(values.mean(axis=0))
        second.append(np.square(values).mean(axis=0))
        if not np.isfinite(second[-1]).all():
            raise DataError(f"{source.name(reading.read)} holds values that are not finite", "remove or replace it")
        if progress is not None and (len(first) % 100 == 0 or len(first) == len(indices)):
            progress("measuring mean and deviation", len(first), len(indices))
    mean = np.mean(first, axis=0)
    std = np.sqrt(np.maximum(np.mean(second, axis=0) - mean**2, 0))
    std[std < 1e-6] = 1.0
    return tuple(mean.tolist()), tuple(std.tolist())
