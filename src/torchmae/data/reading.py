"""Reading many images: past those that are unreadable, in threads, and what a sample of them looks like."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from torchmae.data.formats import CUT_SHORT, NOT_FINITE, Image, Item, Progress, quiet_pillow
from torchmae.data.sources import Source, evenly_spaced
from torchmae.data.transforms import FULL_SCALE, Normalisation
from torchmae.errors import DataError

Result = TypeVar("Result")

MAX_MISSES = 64
"""Unreadable images in a row after which a source counts as gone (a disk that went away, say)."""

MAX_READERS = 8
"""Reader processes that are started unasked."""

FEW = 64
"""Samples that are opened to see what a source holds."""

SAMPLE = 2000
"""Images that mean and deviation are measured on, at most."""

_PICKED = 256  # values of each channel that an image adds to the percentiles
_SHOWN = (0.5, 99.5)  # percentiles that are drawn black and white
FAR = 4.0
"""Floats above are no shares of 1."""

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
        kinds: how many have each type of values.
        notes: what was decided about the samples, a short phrase each.
    """

    channels: int
    sizes: frozenset[tuple[int, ...]]
    kinds: Counter[str]
    notes: tuple[str, ...]


def probe(source: Source, sample: int = FEW) -> Probe:
    """Opens samples evenly evenly_spaced over a source; unreadable ones are passed over.

    Raises:
        DataError: none of them can be read.
    """
    items: list[Item] = []
    failure: DataError | None = None
    for index in evenly_spaced(len(source), sample):
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
    channels = 3 if set(counts) == {1, 3} else counts.most_common(1)[0][0]
    notes = Counter(note for item in items for note in item.notes)
    phrases = [_share(note, count, len(items)) for note, count in notes.items()]
    if channels not in (1, 3) and items[0].form != "array":
        bands = next((item.bands for item in items if item.channels == channels and item.bands), ())
        phrases.append(f"{channels} bands" + (f" ({', '.join(bands)})" if bands else ""))
    for number, count in counts.items():
        if number != channels:
            what = "grey, read as colour" if (number, channels) == (1, 3) else f"of {number} bands, not used"
            phrases.append(_share(what, count, len(items)))
    return Probe(
        channels=channels,
        sizes=frozenset(item.size for item in items),
        kinds=Counter(str(item.dtype) for item in items),
        notes=tuple(phrases),
    )


def _share(note: str, count: int, total: int) -> str:
    return note if count == total else f"{note} ({count} of {total} looked at)"


class Measured(NamedTuple):
    """What the values of a sample of the images are like.

    Attributes:
        normalisation: mean, deviation, and the range that is shown; with the scale of every type among the images.
        notes: what is odd about the values, a short phrase each, with the option that mends it.
    """

    normalisation: Normalisation
    notes: tuple[str, ...]


def measure(
    source: Source,
    *,
    scale: dict[str, float] | None = None,
    kinds: Iterable[str] = (),
    sample: int = SAMPLE,
    progress: Progress | None = None,
) -> Measured:
    """Mean and deviation of each channel of scaled values, the range that is shown, and what is odd about the values.

    Every image of an evenly evenly_spaced sample counts alike, whatever its size. A channel that never changes gets a
    deviation of 1, so that normalising leaves it at 0.

    Args:
        source: images with one number of channels.
        scale: as data.scale.
        kinds: types that are known to be among the images.
        sample: how many to read, at most.
        progress: told how far it is.

    Raises:
        DataError: the images cannot be read.
    """
    indices = evenly_spaced(len(source), sample)
    first: list[npt.NDArray[np.float64]] = []
    second: list[npt.NDArray[np.float64]] = []
    stored: dict[str, list[Image]] = {}  # of each type, (values, C) of each image
    given = Normalisation((), (), scale=scale)
    for reading in read_many(source, indices):
        image = reading.image
        values = image.reshape(-1, image.shape[-1])
        scaled = values.astype(np.float64) * (1 / given.one(image.dtype))
        first.append(scaled.mean(axis=0))
        second.append(np.square(scaled).mean(axis=0))
        stored.setdefault(str(image.dtype), []).append(values[evenly_spaced(len(values), _PICKED)])
        if progress is not None and (len(first) % 100 == 0 or len(first) == len(indices)):
            progress("measuring mean and deviation", len(first), len(indices))
    mean = np.mean(first, axis=0)
    std = np.sqrt(np.maximum(np.mean(second, axis=0) - mean**2, 0))
    std[std < 1e-6] = 1.0
    pools = {kind: np.concatenate(parts) for kind, parts in stored.items()}
    odd = {kind: lone_extremes(pool) for kind, pool in pools.items() if kind != "uint8"}
    low, high = _shown_range(pools, odd, given)
    used = {kind: given.one(np.dtype(kind)) for kind in (*FULL_SCALE, *(scale or {})) if kind in {*pools, *kinds}}
    normalisation = Normalisation(tuple(mean.tolist()), tuple(std.tolist()), low, high, used)
    return Measured(normalisation, tuple(_value_notes(pools, odd, used)))


def lone_extremes(values: Image) -> list[float]:
    """The smallest or largest value, where it comes more than once and lies far from all others.

    Args:
        values: (N, C).
    """
    flat = values.ravel()
    found = []
    for end in (flat.min(), flat.max()):
        rest = flat[flat != end].astype(np.float64)
        if len(flat) - len(rest) > 1 and len(rest):
            extent, gap = rest.max() - rest.min(), min(abs(float(end) - rest.min()), abs(float(end) - rest.max()))
            if gap > 2 * extent > 0:
                found.append(float(end))
    return found


def _shown_range(
    pools: dict[str, Image], odd: dict[str, list[float]], given: Normalisation
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """What is shown black and white in each channel; None, None where 0 and 1 do."""
    if set(pools) == {"uint8"}:
        return None, None
    parts = []
    for kind, pool in pools.items():
        kept = pool[~np.isin(pool, np.asarray(odd.get(kind, ()), pool.dtype)).any(axis=-1)]
        kept = kept if len(kept) else pool
        parts.append(kept.astype(np.float64) / given.one(pool.dtype))
    values = np.concatenate(parts)
    low, high = np.percentile(values, _SHOWN, axis=0)
    if values.min() >= 0 and values.max() <= 1 and high.max() > 0.5:
        return None, None
    flat = high - low < 1e-12
    return tuple((low - flat * 0.5).tolist()), tuple((high + flat * 0.5).tolist())


def _value_notes(pools: dict[str, Image], odd: dict[str, list[float]], used: dict[str, float]) -> Iterator[str]:
    """What is odd about the values of a sample."""
    for kind, values in odd.items():
        for value in values:
            share = (pools[kind] == np.asarray(value).astype(pools[kind].dtype)).mean()
            exact = str(pools[kind].dtype.type(value))  # all digits, so that the option finds it again
            yield f"{exact} in {share:.1%} of the values, far from all others: --data.nodata={exact} if it is none"
    tops = {kind: _top(pool, odd.get(kind, [])) for kind, pool in pools.items()}
    if "uint16" in tops and (bits := max(1, math.ceil(math.log2(tops["uint16"] + 1)))) < 16:
        yield f"{bits}-bit values in uint16"
    if len(used) > 1:
        each = ", ".join(f"{kind} up to {tops[kind]:g} divided by {used[kind]:g}" for kind in tops)
        fitting = {kind: 2.0 ** math.ceil(math.log2(top + 1)) - 1 for kind, top in tops.items() if top > 1}
        wrong = {kind: top for kind, top in fitting.items() if kind in used and top != used[kind]}
        mend = f": --data.scale '{json.dumps(wrong)}' puts all on one scale" if wrong else ""
        yield f"types mixed ({each}){mend}"
    elif "float32" in tops and tops["float32"] > FAR:
        yield f"floats up to {tops['float32']:g}, taken as they are"


def _top(values: Image, odd: Sequence[float]) -> float:
    kept = values[~np.isin(values, np.asarray(odd, values.dtype))]
    return float(kept.max()) if kept.size else 0.0
