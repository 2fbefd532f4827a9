"""Reading many images: past those that are unreadable, in threads, and what a sample of them looks like."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from torchmae.data.formats import CUT_SHORT, NOT_FINITE, Image, Item, Progress, quiet_pillow
from torchmae.data.sources import Source, evenly_spaced
from torchmae.data.transforms import FULL_SCALE, Normalisation
from torchmae.errors import DataError

Result = TypeVar("Result")

MAX_MISSES = 64  # unreadable images in a row after which a source counts as gone (a disk that went away, say)
MAX_READERS = 8  # reader processes that are started unasked
FEW = 64  # samples that are opened to see what a source holds
SAMPLE = 2000  # images that mean and deviation are measured on, at most
FAR = 4.0  # floats above are no shares of 1

_PICKED = 256  # values of each channel that an image adds to the percentiles
_SHOWN = (0.5, 99.5)  # percentiles that are drawn black and white
_AT_ONCE = 64  # images under way at a time in threads
_ANNOUNCED = 256  # images at a time that a source is told of
_WORTH_THREADS = 128 * 128 * 3  # values in an image: of a smaller one, most of the work holds Python's lock
_MENDS = {
    NOT_FINITE: "nodata nan puts the mean in such places",
    CUT_SHORT: "truncated keep takes the rows that are there",
}
"""By what the reason begins with, the option that makes bad files good ones."""


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reader_processes(asked: int | None, sharing: int = 1) -> int:
    """Number of processes that read images: `asked`, else cores // processes that share them, at most MAX_READERS."""
    return max(1, min(MAX_READERS, num_cores() // sharing)) if asked is None else asked


class BadFiles:
    """The files that could not be read, each once.

    Of `total` files a share of `max_bad`, in [0, 1], may be unreadable, and one at least unless it is 0. The user calls
    that share `option`.
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
        """Counts a bad file, once; DataError where there are now more than the limit."""
        self._reasons[name] = reason
        if len(self._reasons) > self.limit:
            allowed = f"more than {self.option} {self.max_bad:g} allows" if self.max_bad else f"and {self.option} is 0"
            group = self.option.rpartition("max_bad")[0]
            mend = next((f"--{group}{text}, or " for begin, text in _MENDS.items() if reason.startswith(begin)), "")
            raise DataError(
                f"{len(self._reasons)} of {self.total} images cannot be read, {allowed}; the last: {name}: {reason}",
                f"{mend}mend or remove them, or raise {self.option}",
            )


def read_or_next(source: Source, index: int, bad: list[tuple[str, str]]) -> tuple[int, Image]:
    """`first_readable`, of whole images."""
    return first_readable(source, index, bad, source.read)


def first_readable(
    source: Source, index: int, bad: list[tuple[str, str]], read: Callable[[int], Result]
) -> tuple[int, Result]:
    """Reads the image at `index` or, where it cannot be read, the next one that can; after the last comes the first.

    `bad` takes (name, reason) of those that cannot.

    Returns:
        the index that was read, and what `read` made of it.

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
    """(N,) the index that is read in place of each sample: itself, or the next readable one; after the last the first.

    `bad` takes the samples that are not `readable`, of which there may not be more than it allows (DataError).
    """
    for index in np.flatnonzero(~readable):
        bad.add(source.name(int(index)), reason)
    good = np.flatnonzero(readable)
    return good[np.searchsorted(good, np.arange(len(readable))) % len(good)]


class Reading(NamedTuple):
    """One image of many."""

    asked: int
    read: int  # another index where that one cannot be read
    image: Image  # (*size, C)
    bad: list[tuple[str, str]]  # name and reason of those that cannot be read


def read_many(source: Source, indices: npt.NDArray[np.int64]) -> Iterator[Reading]:
    """Reads images in the order of `indices`; DataError where MAX_MISSES in a row cannot be read."""

    def read_one(index: int) -> Reading:
        bad: list[tuple[str, str]] = []
        return Reading(index, *read_or_next(source, index, bad), bad)

    first = read_one(int(indices[0]))
    yield first
    yield from map_samples(source, indices[1:], read_one, threads=first.image.size >= _WORTH_THREADS)


def map_samples(
    source: Source, indices: npt.NDArray[np.int64], function: Callable[[int], Result], *, threads: bool = True
) -> Iterator[Result]:
    """`function` of each index, in order, on all cores with `threads`; the source is told of samples in advance."""
    with ThreadPoolExecutor(num_cores()) as pool:
        for start in range(0, len(indices), _ANNOUNCED):
            part = indices[start : start + _ANNOUNCED]
            source.read_ahead(part)
            if not threads or num_cores() == 1:
                yield from map(function, part.tolist())
                continue
            for first in range(0, len(part), _AT_ONCE):
                with quiet_pillow():
                    results = list(pool.map(function, part[first : first + _AT_ONCE].tolist()))
                yield from results


class Probe(NamedTuple):
    """What some samples of a source look like."""

    channels: int  # 3 where some samples are grey and the rest in colour; else what most have
    sizes: frozenset[tuple[int, ...]]  # spatial
    kinds: Counter[str]  # how many have each type of values
    notes: tuple[str, ...]  # what was decided about them, a short phrase each


def probe(source: Source, sample: int = FEW) -> Probe:
    """Opens samples evenly spread over a source; DataError where none of them can be read."""
    items: list[Item] = []
    failure: DataError | None = None
    indices = evenly_spaced(len(source), sample).tolist()
    for index in indices:
        try:
            items.append(source.open(index))
        except DataError as error:
            failure = DataError(f"{source.name(index)}: {error.problem}", error.fix)
    if failure is not None and not items:
        raise DataError(
            f"none of {len(indices)} images can be read; the last: {failure.problem}", failure.fix or "check the data"
        )
    counts = Counter(item.channels for item in items)
    channels = 3 if set(counts) == {1, 3} else counts.most_common(1)[0][0]
    notes = Counter(note for item in items for note in item.notes)
    if channels not in (1, 3) and items[0].form != "array":
        bands = next((item.bands for item in items if item.channels == channels and item.bands), ())
        notes[f"{channels} bands" + (f" ({', '.join(bands)})" if bands else "")] = len(items)
    for number, count in counts.items():
        if number != channels:
            grey = (number, channels) == (1, 3)
            notes["grey, read as colour" if grey else f"of {number} bands, not used"] = count
    return Probe(
        channels=channels,
        sizes=frozenset(item.size for item in items),
        kinds=Counter(str(item.dtype) for item in items),
        notes=tuple(
            note if count == len(items) else f"{note} ({count} of {len(items)} looked at)"
            for note, count in notes.items()
        ),
    )


class Measured(NamedTuple):
    """What the values of some images are like."""

    normalisation: Normalisation  # with the scale of every type among the images
    notes: tuple[str, ...]  # what is odd about the values, a short phrase each, with the option that mends it


def measure(
    source: Source,
    *,
    scale: dict[str, float] | None = None,
    kinds: Iterable[str] = (),
    sample: int = SAMPLE,
    progress: Progress | None = None,
) -> Measured:
    """Mean and deviation of each channel of scaled values, the range that is shown, and what is odd about the values.

    At most `sample` images are read, evenly spaced, and count alike whatever their size; all have as many channels. A
    channel that never changes gets a deviation of 1, so that normalising leaves it at 0. `scale` is data.scale, `kinds`
    are types that are known to be among the images.

    Raises:
        DataError: the images cannot be read.
    """
    indices = evenly_spaced(len(source), sample)
    first: list[npt.NDArray[np.float64]] = []
    second: list[npt.NDArray[np.float64]] = []
    stored: dict[str, list[Image]] = {}  # of each type, (values, C) of each image
    given = Normalisation((), (), scale=scale)
    for done, reading in enumerate(read_many(source, indices), 1):
        image = reading.image
        values = image.reshape(-1, image.shape[-1])
        scaled = values.astype(np.float64) * (1 / given.one(image.dtype))
        first.append(scaled.mean(axis=0))
        second.append(np.square(scaled).mean(axis=0))
        stored.setdefault(str(image.dtype), []).append(values[evenly_spaced(len(values), _PICKED)])
        if progress is not None and (done % 100 == 0 or done == len(indices)):
            progress("measuring mean and deviation", done, len(indices))
    mean = np.mean(first, axis=0)
    std = np.sqrt(np.maximum(np.mean(second, axis=0) - mean**2, 0))
    std[std < 1e-6] = 1.0
    pools = {kind: np.concatenate(parts) for kind, parts in stored.items()}
    odd = {kind: [] if kind == "uint8" else lone_extremes(pool) for kind, pool in pools.items()}
    usual = {kind: pool[~np.isin(pool, np.asarray(odd[kind], pool.dtype)).any(axis=-1)] for kind, pool in pools.items()}
    usual = {kind: values if len(values) else pools[kind] for kind, values in usual.items()}
    low, high = _shown_range(usual, given)
    used = {kind: given.one(np.dtype(kind)) for kind in (*FULL_SCALE, *(scale or {})) if kind in {*pools, *kinds}}
    normalisation = Normalisation(tuple(mean.tolist()), tuple(std.tolist()), low, high, used)
    return Measured(normalisation, tuple(_value_notes(pools, odd, used)))


def lone_extremes(values: Image) -> list[float]:
    """The smallest or largest of (N, C) values, where it comes more than once and lies far from all others."""
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
    pools: dict[str, Image], given: Normalisation
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """The scaled values that are shown black and white in each channel; None, None where 0 and 1 do."""
    if set(pools) == {"uint8"}:
        return None, None
    values = np.concatenate([pool.astype(np.float64) / given.one(pool.dtype) for pool in pools.values()])
    low, high = np.percentile(values, _SHOWN, axis=0)
    if values.min() >= 0 and values.max() <= 1 and high.max() > 0.5:
        return None, None
    flat = high - low < 1e-12
    return tuple((low - flat * 0.5).tolist()), tuple((high + flat * 0.5).tolist())


def _value_notes(pools: dict[str, Image], odd: dict[str, list[float]], used: dict[str, float]) -> Iterator[str]:
    """What is odd about the values of a sample."""
    tops: dict[str, float] = {}
    for kind, pool in pools.items():
        extremes = np.asarray(odd[kind]).astype(pool.dtype)
        for value in extremes:  # in all digits, so that the option finds it again
            share = (pool == value).mean()
            yield f"{value!s} in {share:.1%} of the values, far from all others: --data.nodata={value!s} if it is none"
        tops[kind] = float(pool[~np.isin(pool, extremes)].max(initial=0))
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
