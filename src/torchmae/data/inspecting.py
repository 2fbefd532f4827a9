"""What a data set holds: how many images of what size and kind, which are broken, which are there twice."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from torchmae.data.formats import CUT_SHORT, NOT_FINITE, Item, Progress
from torchmae.data.labels import in_training_classes
from torchmae.data.reading import FEW, map_samples, measure, probe
from torchmae.data.sources import Source, all_notes, digest, evenly_spaced
from torchmae.data.transforms import Normalisation
from torchmae.errors import DataError

_MAX_PATCHES = 256  # in an image, for a suggested patch size: what 224 pixels in patches of 16 come close to
_LARGEST_PATCH = 16  # of pictures, as suggested


@dataclass
class SplitFacts:
    """What one split holds; sizes, channels, types and file formats with the number of images of each."""

    images: int
    examined: int = 0  # images that were read
    sizes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
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

    def add(self, item: Item, low: float, high: float) -> None:
        """Counts a readable image."""
        self.sizes[item.size] += 1
        self.channels[item.channels] += 1
        self.dtypes[str(item.dtype)] += 1
        self.formats[item.form] += 1
        self.low, self.high = min(self.low, low), max(self.high, high)

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
        looks = map_samples(source, chosen[split], partial(_look, source))
        for index, look in zip(chosen[split].tolist(), looks, strict=True):
            if isinstance(look, DataError):
                found.corrupt.append((source.name(index), str(look)))
            else:
                found.add(look.item, look.low, look.high)
                places[look.digest].append((split, index))
            done += 1
            if progress is not None:
                progress("inspecting", done, total)
    groups = [group for group in places.values() if len(group) > 1]
    notes, normalisation = all_notes(splits.values()), None
    for split, source in splits.items():
        if split != "train":
            notes += in_training_classes(source, splits["train"], split)[1]
    with suppress(DataError):  # nothing can be read, which the facts say
        seen = probe(splits["train"])
        measured = measure(splits["train"].with_channels(seen.channels), kinds=seen.kinds, sample=FEW)
        notes += [*seen.notes, *measured.notes]
        normalisation = measured.normalisation
    return Inspection(
        facts,
        [[f"{split}: {splits[split].name(index)}" for split, index in group] for group in groups],
        sum(len({split for split, _ in group}) > 1 for group in groups),
        tuple(notes),
        normalisation,
    )


def class_balance(source: Source) -> dict[str, int]:
    """Images of each class by name or number, "unlabelled" for the rest; empty where nothing has a label."""
    if source.labels is None:
        return {}
    numbers, counts = np.unique(source.labels, return_counts=True)
    names = {-1: "unlabelled", **dict(enumerate(source.classes or ()))}
    return {names.get(int(number), str(number)): int(count) for number, count in zip(numbers, counts, strict=True)}


class _Look(NamedTuple):
    """A readable image, a digest of its values, the smallest and the largest of them."""

    item: Item
    digest: str
    low: float
    high: float


def _look(source: Source, index: int) -> _Look | DataError:
    try:
        item = source.open(index)
        image = item.read()
    except DataError as error:
        return error
    values = digest([image.shape, image.dtype, np.ascontiguousarray(image)])
    return _Look(item, values, float(image.min()), float(image.max()))


def median_size(sizes: Counter[tuple[int, ...]]) -> tuple[int, ...]:
    """The median along each axis, for the number of axes that most images have."""
    dims = Counter(len(size) for size in sizes.elements()).most_common(1)[0][0]
    table = np.array([size for size in sizes.elements() if len(size) == dims])
    return tuple(int(length) for length in np.median(table, axis=0))


def suggested_input(size: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """An input size close to that of images with `size`, and a patch size that divides it, for any number of axes.

    The patch is the smallest power of two from 2 on that gives no more than 256 patches. Pictures so large that it
    would be above 16 are reduced instead.
    """
    patch = 2  # one pixel has nothing to predict but itself, and no contrast to be normalised by
    while math.prod(max(1, length // patch) for length in size) > _MAX_PATCHES:
        patch *= 2
    grid = tuple(max(1, length // patch) for length in size)
    patch = min(patch, _LARGEST_PATCH) if len(size) == 2 else patch
    return tuple(length * patch for length in grid), patch
