"""Reading many images: past those that are unreadable, in threads; what a sample, or all of them, look like."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from torchmae.data.groups import proposed_group
from torchmae.data.items import CUT_SHORT, NOT_FINITE, Image, Item, Progress, Valid, quiet_pillow, tracked
from torchmae.data.sources import Source, all_notes, digest, evenly_spaced, in_training_classes
from torchmae.data.transforms import FULL_SCALE, SMALLEST_STD, Normalisation
from torchmae.errors import DataError
from torchmae.machine import num_cores

Result = TypeVar("Result")

MAX_MISSES = 64  # unreadable images in a row after which a source counts as gone (a disk that went away, say)
MAX_READERS = 8  # reader processes that are started unasked
FEW = 64  # samples that are opened to see what a source holds
SAMPLE = 2000  # images that mean and deviation are measured on, at most
FAR = 4.0  # floats above are no shares of 1

_SAME_SPACING = 1.05  # how many times as large another spacing may be
_SAME_CONTRAST = 4.0
_CLIP, _FRAMES_A_SECOND = 8, 12  # of the clips that are proposed
_SOUND = 4000  # hertz from which on signals are sound
_PICKED = 256  # values of each channel that an image adds to the percentiles
_SHOWN = (0.5, 99.5)  # percentiles that are drawn black and white
_AT_ONCE = 64  # images under way at a time in threads
_ANNOUNCED = 256  # images at a time that a source is told of
_WORTH_THREADS = 128 * 128 * 3  # values in an image: of a smaller one, most of the work holds Python's lock
_MENDS = {
    NOT_FINITE: "nodata auto takes such pixels for no data",
    CUT_SHORT: "truncated keep takes the rows that are there",
}
"""By what the reason begins with, the option that makes bad files good ones."""


def reader_processes(asked: int | None, sharing: int = 1) -> int:
    """Number of processes that read images: `asked`, else cores // processes that share them, at most MAX_READERS."""
    return max(1, min(MAX_READERS, num_cores() // sharing)) if asked is None else asked


class BadFiles:
    """Files that could not be read, each once; at most a share of `max_bad` of `total`, or 1 unless it is 0."""

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
            count = f"{len(self._reasons)} of {self.total} images cannot be read, {allowed}"
            fix = f"{mend}mend or remove them, or raise {self.option}"
            raise DataError(f"{count}; the last: {name}: {reason}", fix)


def first_readable(
    source: Source, index: int, bad: list[tuple[str, str]], read: Callable[[int], Result]
) -> tuple[int, Result]:
    """The image at `index` or, where it cannot be read, the next one that can; after the last comes the first.

    With its index; `bad` takes (name, reason) of those that cannot be read. After a window that cannot be read, those
    of the next image are tried. DataError: MAX_MISSES images in a row.
    """
    missed: set[str] = set()
    fix = ""
    for candidate in range(index, index + len(source)):
        candidate %= len(source)
        if missed and source.name(candidate) in missed:
            continue
        try:
            return candidate, read(candidate)
        except DataError as error:
            name = source.name(candidate)
            missed.add(name)
            bad.append((name, error.problem.removeprefix(f"{name}: ")))
            fix = error.fix
        if len(missed) == MAX_MISSES:
            break
    name, reason = bad[-1]
    problem = f"{len(missed)} images in a row cannot be read; the last: {name}: {reason}"
    raise DataError(problem, fix or "check the data")


Pixels = tuple[Image, Valid | None]  # (*size, C), and which pixels hold data, None: all
Reading = tuple[int, int, Pixels, list[tuple[str, str]]]  # asked for, read; name and reason of bad ones


def read_many(source: Source, indices: npt.NDArray[np.int64]) -> Iterator[Reading]:
    """Reads images in the order of `indices`; DataError where MAX_MISSES in a row cannot be read."""

    def read_one(index: int) -> Reading:
        bad: list[tuple[str, str]] = []
        return index, *first_readable(source, index, bad, source.read_valid), bad

    first = read_one(int(indices[0]))
    yield first
    yield from map_samples(source, indices[1:], read_one, threads=first[2][0].size >= _WORTH_THREADS)


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
    sizes: Counter[tuple[int, ...]]  # how many have each spatial size
    kinds: Counter[str]  # how many have each type of values
    notes: tuple[str, ...]  # what was decided about them, a short phrase each
    example: Item  # one with so many channels


def probe(source: Source, sample: int = FEW) -> Probe:
    """Opens samples evenly spread over a source; DataError where none of them can be read."""
    items: list[Item] = []
    problem = fix = ""
    indices = evenly_spaced(len(source), sample).tolist()
    for index in indices:
        try:
            items.append(source.open(index))
        except DataError as error:
            problem, fix = f"{source.name(index)}: {error.problem}", error.fix
    if not items:
        raise DataError(f"none of {len(indices)} images can be read; the last: {problem}", fix or "check the data")
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
    shares = {n: "" if count == len(items) else f" ({count} of {len(items)} looked at)" for n, count in notes.items()}
    return Probe(
        channels,
        Counter(item.size for item in items),
        Counter(str(item.dtype) for item in items),
        tuple(f"{note}{share}" for note, share in shares.items()),
        next((item for item in items if item.channels == channels), items[0]),
    )


class Measured(NamedTuple):
    """What the values of some images are like."""

    normalisation: Normalisation  # with the scale of every type among the images
    notes: tuple[str, ...]  # what is odd about the values, a short phrase each, with the option that mends it
    percentiles: list[tuple[float, ...]]  # the 1st, 50th and 99th of each channel's stored values
    contrast: float  # how many times the deviation of the 90th percentile of images is that of the 10th


def measure(
    source: Source,
    *,
    scale: dict[str, float] | None = None,
    kinds: Iterable[str] = (),
    sample: int = SAMPLE,
    normalise: str = "dataset",
    progress: Progress | None = None,
) -> Measured:
    """What data.normalise `normalise` takes from scaled values, the range that is shown, and what is odd about them.

    At most `sample` images are read, evenly spaced, and count alike whatever their size, each by its pixels that hold
    data. A channel that never changes gets a deviation of 1. `scale` is data.scale, `kinds` are types known to be
    there. DataError: they cannot be read.
    """
    indices = evenly_spaced(len(source), sample)
    first: list[npt.NDArray[np.float64]] = []
    second: list[npt.NDArray[np.float64]] = []
    stored: dict[str, list[Image]] = {}  # of each type, (values, C) of each image
    inputs: list[npt.NDArray[np.float64]] = []  # of "sample": the same values as the model's input
    given = Normalisation((), (), scale=scale)
    empty: list[float] = []  # share of the pixels of each image
    readings = tracked(read_many(source, indices), progress, "measuring mean and deviation", len(indices))
    for _, _, (image, valid), _ in readings:
        values = image.reshape(-1, image.shape[-1]) if valid is None else image[valid]
        empty.append(0.0 if valid is None else 1 - valid.mean())
        if not len(values):
            continue
        scaled = values.astype(np.float64) * (1 / given.one(image.dtype))
        first.append(scaled.mean(axis=0))
        second.append(np.square(scaled).mean(axis=0))
        picked = evenly_spaced(len(values), _PICKED)
        stored.setdefault(str(image.dtype), []).append(values[picked])
        if normalise == "sample":
            inputs.append((scaled[picked] - first[-1]) / np.maximum(scaled.std(axis=0), SMALLEST_STD))
    if not first:
        raise DataError(f"none of {len(indices)} images holds data", "data.nodata none takes every value as one")
    mean = np.mean(first, axis=0)
    std = np.sqrt(np.maximum(np.mean(second, axis=0) - mean**2, 0))
    pools = {kind: np.concatenate(parts) for kind, parts in stored.items()}
    odd = {kind: [] if kind == "uint8" else lone_extremes(pool) for kind, pool in pools.items()}
    usual = {kind: pool[~np.isin(pool, np.asarray(odd[kind], pool.dtype)).any(axis=-1)] for kind, pool in pools.items()}
    usual = {kind: values if len(values) else pools[kind] for kind, values in usual.items()}
    as_input = Normalisation((), ())  # of values that are divided already
    low, high = _shown_range({"float32": np.concatenate(inputs)}, as_input) if inputs else _shown_range(usual, given)
    if normalise != "dataset":
        mean, std = np.zeros_like(mean), np.ones_like(std)
    elif (limits := Normalisation((), (), low, high, normalise=normalise).limits) is not None:
        values = np.concatenate([pool.astype(np.float64) / given.one(pool.dtype) for pool in pools.values()])
        clipped = values.clip(*limits)
        if (clipped != values).any():  # else mean and deviation of all pixels are exact
            mean, std = clipped.mean(axis=0), clipped.std(axis=0)
    std[std < SMALLEST_STD] = 1.0
    used = {kind: given.one(np.dtype(kind)) for kind in (*FULL_SCALE, *(scale or {})) if kind in {*pools, *kinds}}
    normalisation = Normalisation(tuple(mean.tolist()), tuple(std.tolist()), low, high, used, normalise)
    share = f"{np.mean(empty):.1%} of the pixels hold no data" if any(empty) else ""
    mixed = np.concatenate([pool.astype(np.float64) for pool in usual.values()])
    each = np.sqrt(np.maximum(np.array(second) - np.square(first), 0)).mean(axis=1)
    little, much = np.percentile(each, (10, 90)).tolist()
    return Measured(
        normalisation,
        (*filter(None, [share]), *_value_notes(pools, odd, used)),
        [tuple(values) for values in np.percentile(mixed, (1, 50, 99), axis=0).T.tolist()],
        much / little if little > 0 else 1.0,
    )


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


@dataclass
class SplitFacts:
    """What one split holds; sizes, channels, types and file formats with the number of images of each."""

    images: int
    examined: int = 0  # images that were read
    sizes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    bands: Counter[tuple[str, ...]] = field(default_factory=Counter)  # names of channels
    said: Counter[str] = field(default_factory=Counter)  # what the files say of their pixels: spacing, rate, no-data
    example: dict[str, Any] = field(default_factory=dict)  # `Item.meta` of the first that was read
    spacings: set[tuple[float, ...]] = field(default_factory=set)  # of one pixel, or sample in seconds
    percentiles: list[tuple[float, ...]] = field(default_factory=list)  # as of `Measured`, of the training images
    low: float = math.inf  # smallest value of any image
    high: float = -math.inf
    corrupt: list[tuple[str, str]] = field(default_factory=list)  # (name, reason) of those that cannot be read
    classes: dict[str, int] = field(default_factory=dict)  # `class_balance`

    @property
    def cut_short(self) -> int:
        """How many of the corrupt ones end before their pixels do."""
        return sum(reason.startswith(CUT_SHORT) for _, reason in self.corrupt)

    @property
    def not_finite(self) -> int:
        """How many of the corrupt ones hold values that are no finite numbers."""
        return sum(reason.startswith(NOT_FINITE) for _, reason in self.corrupt)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "images": self.images,
            "examined": self.examined,
            "sizes": {"x".join(map(str, size)): count for size, count in self.sizes.most_common()},
            "median_size": list(median_size(self.sizes)) if self.sizes else None,
            "channels": {str(number): count for number, count in self.channels.most_common()},
            "dtypes": dict(self.dtypes.most_common()),
            "formats": dict(self.formats.most_common()),
            "bands": [list(names) for names, _ in self.bands.most_common()],
            "said": dict(self.said.most_common()),
            "percentiles": [list(values) for values in self.percentiles],
            "range": [self.low, self.high] if self.sizes else None,
            "cut_short": self.cut_short,
            "not_finite": self.not_finite,
            "corrupt": [{"name": name, "reason": reason} for name, reason in self.corrupt],
            "classes": self.classes,
        }


class Inspection(NamedTuple):
    """What a data set holds."""

    splits: dict[str, SplitFacts]
    duplicates: list[list[str]]  # "split: name" of images with the same pixels, a list for each group
    leaked: int  # groups that span two splits: a held-out figure on them is worth nothing
    notes: tuple[str, ...]  # what was assumed, decided or left out, a short phrase each
    normalisation: Normalisation | None  # of the training images; None where they cannot be read
    proposals: dict[str, tuple[str, str]]  # by the name of a setting: a value, and why


def inspect_splits(
    splits: Mapping[str, Source], limit: int | None = None, progress: Progress | None = None
) -> Inspection:
    """Reads the images of every split; with a `limit`, so many of each, evenly spaced."""
    chosen = {split: evenly_spaced(len(source), limit or len(source)) for split, source in splits.items()}
    total, done = sum(map(len, chosen.values())), 0
    facts: dict[str, SplitFacts] = {}
    places: dict[str, list[tuple[str, int]]] = defaultdict(list)  # of images with the same pixels
    for split, source in splits.items():
        found = facts[split] = SplitFacts(len(source), len(chosen[split]), classes=class_balance(source))
        looks = zip(chosen[split].tolist(), map_samples(source, chosen[split], partial(_look, source)), strict=True)
        for index, look in tracked(looks, progress, "inspecting", total, done):
            if isinstance(look, DataError):
                found.corrupt.append((source.name(index), str(look)))
                continue
            item, values, low, high = look
            found.sizes[item.size] += 1
            found.channels[item.channels] += 1
            found.dtypes[str(item.dtype)] += 1
            found.formats[item.form] += 1
            found.bands.update([item.bands] if item.bands else [])
            found.example = found.example or item.meta
            found.spacings.update([item.meta["spacing"]] if "spacing" in item.meta else [])
            found.said.update(filter(None, [_said(item.meta)]))
            found.low, found.high = min(found.low, low), max(found.high, high)
            places[values].append((split, index))
        done += found.examined
    groups = [group for group in places.values() if len(group) > 1]
    notes, normalisation, contrast = all_notes(splits.values()), None, 1.0
    train = splits["train"]
    pattern = None
    if train.groups is not None:
        notes.append(f"{len(np.unique(train.groups)):,} groups of training images")
    else:
        pattern = proposed_group([train.name(i) for i in range(len(train))], train.labels)
    for split, source in splits.items():
        if split != "train":
            notes += in_training_classes(source, splits["train"], split)[1]
    with suppress(DataError):  # nothing can be read, which the facts say
        seen = probe(splits["train"])
        measured = measure(splits["train"].with_channels(seen.channels), kinds=seen.kinds, sample=FEW)
        notes += [*seen.notes, *measured.notes]
        normalisation, contrast = measured.normalisation, measured.contrast
        facts["train"].percentiles = measured.percentiles
    return Inspection(
        facts,
        [[f"{split}: {splits[split].name(index)}" for split, index in group] for group in groups],
        sum(len({split for split, _ in group}) > 1 for group in groups),
        tuple(notes),
        normalisation,
        dict(_proposals(facts["train"], contrast, pattern)),
    )


def _proposals(facts: SplitFacts, contrast: float, pattern: str | None) -> Iterator[tuple[str, tuple[str, str]]]:
    """Settings that suit the training images better than the defaults: a value of each, and why."""
    if pattern is not None:
        yield "group", (pattern, "names look like parts of fewer things, of which whole ones should be held out")
    if len(facts.spacings) > 1 and len({len(spacing) for spacing in facts.spacings}) == 1:
        each = np.array(sorted(facts.spacings))
        if (each.max(axis=0) > _SAME_SPACING * each.min(axis=0)).any():
            yield "spacing", ("median", "files differ in spacing or rate, so that one size means different things")
    if contrast > _SAME_CONTRAST and set(facts.dtypes) != {"uint8"}:
        why = f"contrast differs {contrast:.0f} times between images: each is scaled by itself"
        yield "normalise", ("sample", why)
    flat = [i for i, (low, _, high) in enumerate(facts.percentiles) if low == high]
    if flat and len(flat) < len(facts.percentiles) > 3:
        kept = [i + 1 for i in range(len(facts.percentiles)) if i not in flat]
        yield "channels", (json.dumps(kept), f"channel {', '.join(str(i + 1) for i in flat)} hardly ever changes")
    fps, frames = facts.example.get("fps"), median_size(facts.sizes)[0] if facts.sizes else 0
    if fps and frames >= _CLIP:
        stride = max(1, min(round(fps / _FRAMES_A_SECOND), frames // _CLIP))
        yield "clip", (json.dumps([_CLIP, stride]), f"clips of {_CLIP * stride / fps:.2g} s, of {frames / fps:.2g} s")


def is_sound(size: tuple[int, ...], meta: Mapping[str, Any]) -> bool:
    """Whether a sample of a size, with the `meta` of its `Item`, is a recording of sound, or the spectrogram of one."""
    return "rate" in meta and (len(size) == 2 or meta["rate"] >= _SOUND)


def kind_of_data(facts: SplitFacts) -> str:
    """What the samples seem to be, as one sentence: "signals such as ECG: 12 channels, 5 s at 360 Hz"."""
    size, channels = median_size(facts.sizes), facts.channels.most_common(1)[0][0]
    meta, form = facts.example, facts.formats.most_common(1)[0][0]
    bands = f"{channels} channel{'s' if channels > 1 else ''}"
    sides = " x ".join(map(str, size))
    if "rate" in meta and len(size) == 1:
        what = "sound" if is_sound(size, meta) else "signals such as ECG"
        return f"{what}: {bands}, {size[0] / meta['rate']:.3g} s at {meta['rate']:g} Hz"
    if "fps" in meta:
        seconds = size[0] / meta["fps"]
        return f"video: {seconds:.3g} s at {meta['fps']:.3g} frames a second, frames of {size[1]} x {size[2]}"
    if len(size) != 2:
        spacing = " x ".join(f"{length:.3g}" for length in meta.get("spacing", ()))
        what = "signals" if len(size) == 1 else "volumes"
        return f"{what}: {bands}, {sides}{f', spacing {spacing}' if spacing else ''}"
    if "crs" in meta:
        return f"scenes of the earth: {bands}, {sides}, pixels of {meta['spacing'][0]:.3g} in {meta['crs']}"
    if form in ("DICOM", "NIfTI"):
        return f"medical slices: {bands}, {sides}"
    if set(facts.dtypes) == {"uint8"} and channels in (1, 3):
        return f"{'colour' if channels == 3 else 'grey'} pictures: {sides}"
    return f"images of measurements: {bands}, {sides}, {facts.dtypes.most_common(1)[0][0]}"


def _said(meta: Mapping[str, Any]) -> str:
    """What a file says of its pixels, for people: "8000 Hz", "spacing 2.5 x 0.5 x 0.5, no data: -1024"."""
    words = [f"{meta[key]:g} {unit}" for key, unit in (("rate", "Hz"), ("fps", "frames a second")) if key in meta]
    if not words and "spacing" in meta:
        words.append("spacing " + " x ".join(f"{length:g}" for length in meta["spacing"]))
    words += [meta["crs"]] if meta.get("crs") else []
    return ", ".join([*words, *([f"no data: {meta['nodata']}"] if "nodata" in meta else [])])


def class_balance(source: Source) -> dict[str, int]:
    """Images of each class by name or number, "unlabelled" for the rest; empty where nothing has a label."""
    if source.labels is None:
        return {}
    numbers, counts = np.unique(source.labels, return_counts=True)
    names = {-1: "unlabelled", **dict(enumerate(source.classes or ()))}
    return {names.get(int(number), str(number)): int(count) for number, count in zip(numbers, counts, strict=True)}


def _look(source: Source, index: int) -> tuple[Item, str, float, float] | DataError:
    """A readable image, a digest of its values, the smallest and the largest of them; or why it is not readable."""
    try:
        item = source.open(index)
        image, valid = item.read_valid()
        if valid is not None and not valid.any():
            raise DataError("holds no data at all")
    except DataError as error:
        return error
    values = digest([image.shape, image.dtype, np.ascontiguousarray(image)])
    measured = image if valid is None else image[valid]
    return item, values, float(measured.min()), float(measured.max())


def median_size(sizes: Counter[tuple[int, ...]]) -> tuple[int, ...]:
    """The median along each axis, for the number of axes that most images have."""
    dims = Counter(len(size) for size in sizes.elements()).most_common(1)[0][0]
    table = np.array([size for size in sizes.elements() if len(size) == dims])
    return tuple(int(length) for length in np.median(table, axis=0))
