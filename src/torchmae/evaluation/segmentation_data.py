"""Pictures with masks: which mask belongs to which picture, and which class each of its pixels is of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from torchmae.config.evaluate import EvaluateOptions, SegmentationOptions
from torchmae.data.formats import open_pillow
from torchmae.data.items import Context, check_pixels, one_line_errors, tracked
from torchmae.data.loader import Indices
from torchmae.data.opening import HELD_OUT, held_out_images
from torchmae.data.reading import map_samples
from torchmae.data.sources import FileSource, Source, Subset, digest
from torchmae.errors import ConfigError, DataError
from torchmae.evaluation.images import EvaluationData, ModelInput, fixed_part, image_sets

ClassMap = npt.NDArray[np.uint8]
"""(H, W), the class of each pixel; `IGNORED` where it does not count."""

IGNORED = 255
_GREY = 0x010101  # times a grey value: the same as a colour
_MANY_IDS = 100  # ids as large are seldom classes
_MANY_COLOURS = 64
_SOFT = 0.95  # of the largest value: the inside of an object in a mask with soft edges


class Seen(NamedTuple):
    """What a mask holds: its file, the different values and how many pixels have each, and a digest of the file."""

    name: str
    is_colour: bool
    values: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    content: str


class Pairs(Subset):
    """Pictures, each with the file of its mask, which has the picture's size."""

    def __init__(
        self, source: Source, rows: Indices, files: Sequence[Path], sizes: Sequence[Any], content: str
    ) -> None:
        super().__init__(source, rows)
        self.labels = self.classes = None
        self.files, self.sizes, self._content = files, sizes, content

    def label_fingerprint(self) -> str:
        """A hexadecimal digest that changes when the file of a mask does."""
        return self._content


@dataclass(frozen=True)
class ClassMaps:
    """How masks are read.

    Attributes:
        context: how files are opened.
        is_colour: a class is a colour.
        values: (V,) what masks hold, rising; a colour as one number.
        numbers: (V,) the class that each value means.
    """

    context: Context
    is_colour: bool
    values: npt.NDArray[np.int64]
    numbers: ClassMap

    def read(self, path: Path) -> ClassMap:
        """The class of each pixel of a mask; DataError where it cannot be read."""
        stored, is_colour, _ = read_mask(path, self.context)
        stored = stored * _GREY if self.is_colour and not is_colour else stored
        return self.numbers[np.searchsorted(self.values, stored).clip(max=len(self.values) - 1)]


@dataclass(frozen=True)
class SegmentationData(EvaluationData):
    """Pictures whose sources are `Pairs`, and how their masks are read."""

    maps: ClassMaps


def open_segmentation_data(options: EvaluateOptions, model: ModelInput) -> SegmentationData:
    """Opens pictures and looks at all of their masks.

    Args:
        options: `options.data.source` is not None.
        model: what the pictures are for.

    Raises:
        ConfigError: options that do not fit the data, or a model of something else than pictures.
        DataError: a picture without a mask, a mask of another size, values that are no classes, a single class.
    """
    if len(model.input_size) != 2:
        raise ConfigError(
            f"the model takes {len(model.input_size)} axes and masks are of pictures", "use knn or linear"
        )
    context = model.context(options.data)
    splits = model.splits(options.data)
    name = options.test_data or next((name for name in ("test", "val") if name in splits), HELD_OUT)
    order = ("test", "val", "train")
    train, test, apart = held_out_images(splits, name, options.data.val_size, context, "test_data", order)
    wanted = {"training": fixed_part(train, options.train_images), "test": fixed_part(test, options.test_images)}
    pairs, seen, unread = zip(*(_look(what, source, context) for what, source in wanted.items()), strict=True)
    maps, classes = read_classes([*seen[0], *seen[1]], options.segmentation, context)
    present = np.unique(np.concatenate([_numbers(item, maps) for item in seen[0]]))
    found = [classes[number] for number in present if number != IGNORED]
    if len(found) < 2:
        raise DataError(
            f"all {len(seen[0]):,} training masks are of {', '.join(found) or 'no class'} alone",
            "give masks of two classes or more, or change segmentation.threshold or segmentation.ignore",
        )
    # Windows are cut here, of pictures and masks together.
    sets, said = image_sets(pairs, replace(options.data, window="none"), model)
    for name, reason in (item for items in unread for item in items):
        sets[0].bad.add(name, reason)
    notes = (*apart.notes, *(note for note in said if note.startswith("data:")))
    return SegmentationData(sets[0], sets[1], classes, notes, maps, twins=apart.twins)


def _look(what: str, source: Source, context: Context) -> tuple[Pairs, list[Seen], list[tuple[str, str]]]:
    """The pictures with a mask that can both be read, what the masks hold, and (name, reason) of the others."""
    files = [None if source.masks is None else source.masks.of(source.name(i)) for i in range(len(source))]
    alone = [source.name(i) for i, file in enumerate(files) if file is None or not file.is_file()]
    if alone:
        raise DataError(
            f"{len(alone):,} of {len(source):,} {what} pictures have no mask, such as {alone[0]}",
            "put masks/ beside images/ under the same names, or x_mask.png beside x.jpg, or give a CSV file with the "
            "columns image and mask",
        )
    masks = [file for file in files if file is not None]
    found = tracked(look_at(source, masks, context), context.progress, f"{what} masks", len(source))
    good, bad = {}, []
    for index, item in enumerate(found):
        if isinstance(item[1], Seen):
            good[index] = item[0], item[1]
        else:
            bad.append(item)
    if not good:
        raise DataError(f"none of {len(source):,} {what} pairs can be read; the last: {': '.join(bad[-1])}")
    sizes, seen = zip(*good.values(), strict=True)
    content = digest(item.content for item in seen)
    return Pairs(source, np.array([*good]), [masks[index] for index in good], sizes, content), [*seen], bad


def look_at(
    source: Source, masks: Sequence[Path], context: Context
) -> Iterator[tuple[tuple[int, ...], Seen] | tuple[str, str]]:
    """Of each picture its size and what its mask holds; a name and a reason where one of them cannot be read.

    Raises:
        DataError: a mask has another size than its picture.
    """

    def look(index: int) -> tuple[tuple[int, ...], Seen] | tuple[str, str]:
        try:
            size = source.open(index).size
        except DataError as error:
            return source.name(index), error.problem
        try:
            stored, is_colour, data = read_mask(masks[index], context)
        except DataError as error:
            return str(masks[index]), error.problem
        if stored.shape != size:
            ours, theirs = (f"{width} x {height}" for height, width in (stored.shape, size))
            raise DataError(
                f"{masks[index]} is {ours} pixels and its picture {theirs}", "save it in the picture's size"
            )
        return size, Seen(str(masks[index]), is_colour, *_counted(stored), digest([data]))

    return map_samples(source, np.arange(len(source)), look)


def _counted(stored: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The different values, rising, and how often each is there."""
    if stored.min() < 0 or stored.max() >= 2**16:
        return np.unique(stored, return_counts=True)
    counts = np.bincount(stored.ravel())  # many times faster
    values = np.flatnonzero(counts)
    return values, counts[values]


def read_mask(path: Path, context: Context) -> tuple[npt.NDArray[np.int64], bool, bytes]:
    """The values of a mask, (H, W), a colour as one number; whether it is in colour; and the content of its file.

    A palette is not looked up: its numbers are the values. DataError, without the path: it cannot be read as a mask.
    """
    context = Context(max_megapixels=context.max_megapixels, nodata="none")  # else 0 may be lost where a TIFF says so
    source = FileSource(Path(), [str(path)], context=context)
    data = source.encoded(0)
    if data[:4] == b"\x89PNG" and data[25:26] == b"\3":
        with one_line_errors():
            picture = open_pillow(data, "PNG")
            check_pixels((picture.height, picture.width), context)
            return np.asarray(picture, dtype=np.int64), False, data
    values = source.open(0).read()
    if values.dtype.kind == "f" and (values != np.rint(values)).any():
        raise DataError("its values are no whole numbers", "save ids of classes")
    stored = values.astype(np.int64)
    if stored.shape[2:] == (3,) and (stored != stored[..., :1]).any():
        return stored @ np.array([65536, 256, 1]), True, data
    if stored.shape[2:] not in ((1,), (3,)):
        raise DataError(f"it has {stored.shape[-1]} channels", "save ids in one channel, or colours in three")
    return stored[..., 0], False, data


def read_classes(
    seen: Sequence[Seen], options: SegmentationOptions, context: Context
) -> tuple[ClassMaps, tuple[str, ...]]:
    """What the values of masks mean, and the names of the classes; DataError where that is not plain."""
    is_colour = any(item.is_colour for item in seen)
    counts: Counter[int] = Counter()
    example: dict[int, str] = {}
    for item in seen:
        for value, count in zip(_values(item, is_colour=is_colour).tolist(), item.counts.tolist(), strict=True):
            counts[value] += count
            example.setdefault(value, item.name)
    values = sorted(counts)
    known = [value for value in values if value != options.ignore]
    limit = 0 if options.instances else options.threshold
    if limit is not None:
        if is_colour and limit:
            raise ConfigError(f"segmentation.threshold is {limit} and the masks are in colours", "leave it out")
        classes: tuple[str, ...] = ("background", "foreground")
        number_of = {value: int(value > limit) for value in known}
    elif is_colour:
        if len(known) > (options.classes or _MANY_COLOURS):
            raise DataError(
                f"the masks have {len(known):,} colours, such as #{known[-1]:06x} in {example[known[-1]]}",
                "save one colour a class without smoothing, or --segmentation.instances true for one an object",
            )
        classes = tuple(f"#{value:06x}" for value in known)
        number_of = {value: number for number, value in enumerate(known)}
    elif options.classes is None and len(known) == 2 and known[0] == 0:
        classes, number_of = ("0", str(known[1])), {0: 0, known[1]: 1}
    else:
        _check_ids(known, counts, example, options.classes)
        classes = tuple(map(str, range(options.classes or max(known, default=0) + 1)))
        number_of = {value: value for value in known}
    numbers = np.array([number_of.get(value, IGNORED) for value in values], dtype=np.uint8)
    return ClassMaps(context, is_colour, np.array(values), numbers), classes


def _check_ids(known: Sequence[int], counts: Counter[int], example: dict[int, str], classes: int | None) -> None:
    """DataError where values are no ids of classes, with what they look like; `known` are rising."""
    top = known[-1] if known else 0
    if known and known[0] < 0:
        raise DataError(f"{example[known[0]]} holds the id {known[0]}", "number classes from 0")
    if classes is not None:
        if top >= classes:
            raise DataError(
                f"{example[top]} holds the id {top} and segmentation.classes is {classes}: ids end at {classes - 1}",
                f"--segmentation.classes {top + 1}, or --segmentation.ignore {top} if such pixels do not count",
            )
        return
    if top < _MANY_IDS:
        return
    if len(known) == 1:
        raise DataError(f"all masks hold {top} alone ({example[top]})", "give masks with two classes or more")
    if top == IGNORED and known[-2] < _MANY_IDS:
        raise DataError(
            f"the masks hold ids up to {known[-2]} and {top} ({example[top]}), which often means: not labelled",
            f"--segmentation.ignore {top}, or --segmentation.classes for as many classes",
        )
    inside = sum(counts[value] for value in known if value >= _SOFT * top)
    if 2 * inside > sum(counts[value] for value in known if value > 0):
        raise DataError(
            f"the masks hold {len(known)} values up to {top} ({example[top]}), as from soft edges or JPEG",
            f"--segmentation.threshold {top // 2} makes two classes of them",
        )
    raise DataError(
        f"the masks hold ids up to {top} ({example[top]}), as objects have them that are numbered one by one",
        "--segmentation.instances true makes all of them foreground; --segmentation.classes N keeps them as classes",
    )


def _values(item: Seen, *, is_colour: bool) -> npt.NDArray[np.int64]:
    return item.values * _GREY if is_colour and not item.is_colour else item.values


def _numbers(item: Seen, maps: ClassMaps) -> ClassMap:
    return maps.numbers[np.searchsorted(maps.values, _values(item, is_colour=maps.is_colour))]
