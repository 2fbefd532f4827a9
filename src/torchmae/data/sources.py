"""What samples come from: a `Source` opens each as an `Item`, whatever it lies in, and knows the labels."""

from __future__ import annotations

import copy
import hashlib
import os
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from torchmae.data.formats import open_item, read_file
from torchmae.data.items import Context, Image, Item, Progress, Valid, WindowItem, tracked
from torchmae.errors import DataError, printable

if TYPE_CHECKING:
    from torchmae.data.folders import Masks

Labels = npt.NDArray[np.int64]
Tags = npt.NDArray[np.int8]
SEVERAL = "|"
"""Between the names of several classes of one image, in the label of a list."""

_AS_TAGS = "read as several classes an image, which data pack leaves out"
_MOST_TAGS = 2**28
_SIZES_ASKED = 10_000
_NUMBER = re.compile(r"-?\d{1,18}(\.0+)?")  # "3.0": a table with gaps turns whole numbers into floats
_MEASURED = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_UNKNOWN = {"", "-1"}
_LARGEST = 100_000  # number of a class; larger ones are identifiers, and are numbered in their order
_NAMED = 5  # classes that a note lists


class Strings:
    """Byte strings in one buffer: a million file names take 30 MB, and worker processes share them."""

    def __init__(self, values: Iterable[bytes] = ()) -> None:
        self._content: Any = bytearray()
        self._ends = array("q")
        for value in values:
            self.add(value)

    @classmethod
    def of(cls, content: bytes, ends: npt.NDArray[np.int64]) -> Strings:
        """The strings that end at `ends` (rising) within `content`."""
        strings = cls()
        strings._content, strings._ends = content, array("q", ends.tobytes())
        return strings

    @property
    def parts(self) -> tuple[bytes, npt.NDArray[np.int64]]:
        """All strings one after the other, and the end of each."""
        return self._content, np.frombuffer(self._ends, dtype=np.int64)

    def add(self, value: bytes) -> None:
        """Appends a string."""
        self._content += value
        self._ends.append(len(self._content))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        return bytes(self._content[self._ends[index - 1] if index else 0 : self._ends[index]])

    def __iter__(self) -> Iterator[bytes]:
        return map(self.__getitem__, range(len(self)))


class Source(ABC):
    """Samples in a fixed order, with labels where there are any."""

    labels: Labels | None = None  # (N,), -1 where unknown; None: no sample has a label
    classes: tuple[str, ...] | None = None  # the name of each label or column of tags, where known
    tags: Tags | None = None  # (N, C) of samples with several classes each: 1 where it is of a class; -1: unknown
    groups: npt.NDArray[np.str_] | None = None  # (N,) of data.group: the patient, scene or record of each sample
    remarks: tuple[str, ...] = ()  # what was assumed or left out, a short phrase each: "3 .heic files not used"
    masks: Masks | None = None  # of the samples, where there are any

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def open(self, index: int) -> Item:
        """One sample, its header read; DataError with the reason, without the sample's name."""

    def open_page(self, index: int, page: int) -> Item:  # noqa: ARG002
        """One page, from 0, of a sample's file."""
        return self.open(index)

    @abstractmethod
    def name(self, index: int) -> str:
        """Where a sample is from, for messages: a path, or "digits/17"."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hexadecimal digest that changes when samples are added, removed, renamed or replaced."""

    def with_channels(self, channels: int) -> Source:  # noqa: ARG002
        """The same samples read with `channels` channels; ConfigError where they cannot be. Here: as they are."""
        return self

    def read(self, index: int) -> Image:
        """The values of a sample, (*size, C) uint8, uint16 or float32; DataError with the sample's name."""
        with self._named(index):
            return self.open(index).read()

    def read_valid(self, index: int) -> tuple[Image, Valid | None]:
        """As `Item.read_valid`, of a whole sample; DataError with its name."""
        with self._named(index):
            return self.open(index).read_valid()

    @contextmanager
    def _named(self, index: int) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            raise DataError(f"{self.name(index)}: {error.problem}", error.fix) from None

    def _take_labels(self, labels: npt.ArrayLike | None, classes: Sequence[str] | None) -> None:
        """Sets labels and classes from any form that they are stored in (`read_labels`)."""
        read = ReadLabels(None) if labels is None else read_labels(labels, len(self))
        self.labels, self.tags = read.labels, read.tags
        is_named = classes is not None and (not read.note if read.tags is None else read.tags.shape[1] == len(classes))
        self.classes = read.classes or (tuple(classes or ()) if is_named else None)
        self.remarks += (read.note,) if read.note else ()

    def label_fingerprint(self) -> str:
        """A hexadecimal digest that changes when labels or classes do; "" without labels."""
        known = self.labels if self.tags is None else self.tags
        return "" if known is None else digest([np.ascontiguousarray(known), *(self.classes or ())])

    def stamp(self) -> str:
        """A text that changes when a file is replaced by one of the same name and size; "" where nothing tells."""
        return ""

    def encoded(self, index: int) -> bytes | None:  # noqa: ARG002
        """The content of a sample's own file; None: it has none. DataError without the sample's name."""
        return None

    def whole(self) -> tuple[Image, npt.NDArray[np.int64] | None] | None:
        """The array in memory that holds the samples, (M, *size, C), and the row of each (None: in order); or None."""
        return None

    def read_ahead(self, indices: npt.NDArray[np.int64]) -> None:  # noqa: B027 (most have nothing to do)
        """Starts to fetch these samples; returns at once, and fails for none of them."""


def all_notes(sources: Iterable[Source]) -> list[str]:
    """The remarks of all sources, each once."""
    return list(dict.fromkeys(note for source in sources for note in source.remarks))


def data_line(notes: Iterable[str]) -> str:
    """The line that says what was assumed, decided or left out; "" where nothing was."""
    said = "; ".join(dict.fromkeys(notes))
    return f"data: {said}" if said else ""


def digest(parts: Iterable[object]) -> str:
    """32 hexadecimal digits of texts, bytes and contiguous arrays, the same on every machine."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        is_plain = isinstance(part, (bytes, bytearray, np.ndarray))
        state.update(part if is_plain else str(part).encode("utf-8", "backslashreplace"))  # type: ignore[arg-type]
        state.update(b"\0")
    return state.hexdigest()


def evenly_spaced(length: int, count: int) -> npt.NDArray[np.int64]:
    """At most `count` different indices below `length`, from the first to the last."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))


class EncodedSource(Source):
    """Samples that are stored as encoded files, wherever those lie, and decoded when they are read."""

    def __init__(
        self, length: int, labels: npt.ArrayLike | None, classes: Sequence[str] | None, context: Context
    ) -> None:
        self.context = context
        self._length = length
        self._take_labels(labels, classes)

    def __len__(self) -> int:
        return self._length

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The content of a sample's file; DataError without the sample's name."""

    def open(self, index: int) -> Item:
        return self.open_page(index, self.context.page)

    def open_page(self, index: int, page: int) -> Item:
        context = self.context if page == self.context.page else replace(self.context, page=page)
        return open_item(self.content(index), context, lambda: self.name(index))

    def content(self, index: int) -> bytes | Path | tuple[Path, ...]:
        """A sample's file as `open_item` takes it: its content, or paths where it lies on a disk."""
        return self.encoded(index)

    def with_channels(self, channels: int) -> Self:
        """The same samples; grey and colour are converted, a sample with another number cannot be opened."""
        same = copy.copy(self)
        same.context = replace(self.context, num_channels=channels)
        return same


class FileSource(EncodedSource):
    """Encoded files on a disk: `names` are paths relative to `root`, with "/"; labels in any form of `read_labels`."""

    def __init__(
        self,
        root: Path,
        names: Sequence[str] | Strings,
        labels: npt.ArrayLike | None = None,
        classes: Sequence[str] | None = None,
        context: Context = Context(),
        remarks: Sequence[str] = (),
    ) -> None:
        super().__init__(len(names), labels, classes, context)
        self._root = root
        self._names = names if isinstance(names, Strings) else Strings(map(os.fsencode, names))
        self.remarks = (*remarks, *self.remarks)

    def _path(self, index: int) -> Path:
        return self._root / os.fsdecode(self._names[index])

    def content(self, index: int) -> Path:
        return self._path(index)

    def encoded(self, index: int) -> bytes:
        return read_file(self._path(index))

    def name(self, index: int) -> str:
        return printable(os.fsencode(self._path(index)))

    def fingerprint(self) -> str:
        """Of all names, and of the sizes of at most 10,000 files: on a network, a million take minutes."""
        return digest([*self._names.parts, *self._status(evenly_spaced(len(self), _SIZES_ASKED).tolist(), "st_size")])

    def stamp(self) -> str:
        return digest(self._status(range(len(self)), "st_mtime_ns"))

    def _status(self, indices: Iterable[int], field: str) -> Iterator[int]:
        """A field of the status of files; -1 where there is no file."""
        for index in indices:
            try:
                yield int(getattr(self._path(index).stat(), field))
            except (OSError, ValueError):
                yield -1


class Subset(Source):
    """The samples of a source at (M,) `indices`, in this order."""

    def __init__(self, source: Source, indices: npt.NDArray[np.int64]) -> None:
        self.source = source
        self.indices = indices
        self.labels = None if source.labels is None else source.labels[indices]
        self.tags = None if source.tags is None else source.tags[indices]
        self.groups = None if source.groups is None else source.groups[indices]
        self.classes, self.remarks, self.masks = source.classes, source.remarks, source.masks

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, index: int) -> Item:
        return self.source.open(int(self.indices[index]))

    def encoded(self, index: int) -> bytes | None:
        return self.source.encoded(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def fingerprint(self) -> str:
        """Of the source's and the indices."""
        return digest([self.source.fingerprint(), np.ascontiguousarray(self.indices)])

    def stamp(self) -> str:
        return self.source.stamp()

    def with_channels(self, channels: int) -> Subset:
        same = copy.copy(self)
        same.source = self.source.with_channels(channels)
        return same

    def whole(self) -> tuple[Image, npt.NDArray[np.int64] | None] | None:
        found = self.source.whole()
        if found is None:
            return None
        images, rows = found
        return images, self.indices if rows is None else rows[self.indices]

    def read_ahead(self, indices: npt.NDArray[np.int64]) -> None:
        self.source.read_ahead(self.indices[indices])


class Windows(Subset):
    """Windows of a source's images, as an even grid over each, as samples; they overlap where they do not come even.

    `boxes`, (N, n, 2), is a window of each image, at any place. An image stays open until a window of another is asked
    for: many formats are decoded whole.
    """

    def __init__(self, source: Source, sizes: npt.NDArray[np.int64], boxes: npt.NDArray[np.int64]) -> None:
        self._sizes, self._lengths = sizes, boxes[..., 1]
        self._free = sizes - self._lengths
        self._counts = -(-sizes // self._lengths)
        self._last: tuple[tuple[int, int], Item] | None = None  # process and image; no file is shared with a worker
        per_image = self._counts.prod(axis=1)
        super().__init__(source, np.repeat(np.arange(len(sizes)), per_image))
        self._place = np.arange(len(self.indices)) - np.repeat(np.cumsum(per_image) - per_image, per_image)

    def open(self, index: int) -> Item:
        image, last = int(self.indices[index]), self._last
        if last is None or last[0] != (os.getpid(), image):
            self._last = last = (os.getpid(), image), self.source.open(image)
        return WindowItem(last[1], self.region(index))

    def region(self, index: int) -> tuple[tuple[int, int], ...]:
        """Start and length of a window along each axis of its image."""
        image = int(self.indices[index])
        steps = np.unravel_index(int(self._place[index]), self._counts[image])
        starts = np.array(steps) * self._free[image] // np.maximum(self._counts[image] - 1, 1)
        return tuple(zip(starts.tolist(), self._lengths[image].tolist(), strict=True))

    def size(self, image: int) -> tuple[int, ...]:
        """The size of an image of the source."""
        return tuple(self._sizes[image].tolist())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def encoded(self, index: int) -> None:  # noqa: ARG002
        """None: a window has no file of its own."""
        return

    def fingerprint(self) -> str:
        return digest(
            [self.source.fingerprint(), np.ascontiguousarray(self._lengths), np.ascontiguousarray(self._free)]
        )

    def whole(self) -> tuple[Image, npt.NDArray[np.int64] | None] | None:
        """None, unless each window is its whole image: they lie in no array of their own."""
        return None if self._free.any() else super().whole()


class EachPage(Subset):
    """Every page of a source's files as a sample of its own; file i has `counts[i]` pages."""

    def __init__(self, source: Source, counts: npt.NDArray[np.int64]) -> None:
        super().__init__(source, np.repeat(np.arange(len(counts)), counts))
        self._pages = np.concatenate([np.arange(count) for count in counts])
        self.remarks = (*source.remarks, f"{len(self):,} pages of {len(counts):,} files, each a sample")

    def open(self, index: int) -> Item:
        return self.source.open_page(int(self.indices[index]), int(self._pages[index]))

    def name(self, index: int) -> str:
        """The file and the page, from 1."""
        return f"{super().name(index)}, page {self._pages[index] + 1}"


def each_page(source: Source, progress: Progress | None) -> Source:
    """A source whose samples are the pages of the files; the source itself where each file has one page."""
    counts = np.ones(len(source), dtype=np.int64)
    for index in tracked(range(len(source)), progress, "counting pages", len(source)):
        with suppress(DataError):  # which says so again when it is read
            counts[index] = source.open(index).meta.get("pages", 1)
    return source if (counts == 1).all() else EachPage(source, counts)


class ReadLabels(NamedTuple):
    """Labels as they can be used."""

    labels: Labels | None  # (N,), -1 where unknown; None: they are no classes
    classes: tuple[str, ...] | None = None  # the name of each number, where there are names
    note: str = ""  # what was made of them where that is not plain
    tags: Tags | None = None  # (N, C), as of `Source`


def read_labels(values: npt.ArrayLike, count: int) -> ReadLabels:
    """Labels of `count` images from an array: whole numbers, names, or a column for each class.

    Integers and floats without a fraction are numbers of classes; negative ones and NaN mean unknown. Text is names,
    "" unknown. (N, C) of 0 and 1 is one class of C where each row has a single 1, else tags. Anything else (masks,
    measurements) is no class of an image: training does without it.
    """
    array = np.asarray(values)
    given = f"labels of shape {array.shape} and type {array.dtype}"
    array = array[:, 0] if array.shape == (count, 1) else array
    if array.shape == (count,):
        if array.dtype.kind in "USO":
            texts = (v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in array.tolist())
            return from_texts([*texts])
        numbers = np.where(np.isnan(array), -1, array) if array.dtype.kind == "f" else array
        if array.dtype.kind in "biuf" and (numbers == np.rint(numbers)).all() and (np.abs(numbers) < 2**53).all():
            return _from_numbers(numbers.astype(np.int64))
    is_table = array.ndim == 2 and len(array) == count and array.shape[1] > 1 and array.dtype.kind in "biuf"
    if is_table and np.isin(array, (0, 1)).all():
        if (array.sum(axis=1) == 1).all():
            return ReadLabels(array.argmax(axis=1).astype(np.int64), None, f"{given} are read as one class an image")
        return ReadLabels(None, None, f"{given} are {_AS_TAGS}", array.astype(np.int8))
    return ReadLabels(None, None, f"{given} are not used: figures of classes need one number or name an image")


def from_texts(texts: Sequence[str], training: Iterable[str] | None = None) -> ReadLabels:
    """Labels as numbers where all are whole, else as names; "" and "-1": unknown. `training` None: all of them.

    Where any names several classes with `SEVERAL` between them, tags.
    """
    different, inverse = np.unique(np.array(texts, dtype=object), return_inverse=True)
    if all(text == "" or _NUMBER.fullmatch(text) for text in different):
        numbers = np.array([int(text.partition(".")[0] or -1) for text in different], dtype=np.int64)
        return _from_numbers(numbers[inverse])
    if all(text == "" or _MEASURED.fullmatch(text) for text in different):
        example = next(text for text in different if text)
        return ReadLabels(None, None, f"labels such as {example} are measurements and not used")
    if any(SEVERAL in text for text in different):
        return _from_several(texts, texts if training is None else training)
    names = set(different) - _UNKNOWN
    classes = ordered_classes(names if training is None else names & set(training), names)
    number_of = {**dict.fromkeys(_UNKNOWN, -1), **{name: i for i, name in enumerate(classes)}}
    return ReadLabels(np.array([number_of[name] for name in different], dtype=np.int64)[inverse], classes)


def _from_several(texts: Sequence[str], training: Iterable[str]) -> ReadLabels:
    split = [{name.strip() for name in text.split(SEVERAL)} - _UNKNOWN for text in texts]
    trained = {name.strip() for text in training for name in text.split(SEVERAL)} - _UNKNOWN
    classes = ordered_classes(trained, set().union(*split))
    if len(classes) * len(split) > _MOST_TAGS:
        note = f"labels of {len(classes):,} classes, several an image, are not used: too many"
        return ReadLabels(None, None, note)
    tags = np.array([[name in names for name in classes] if names else [-1] * len(classes) for names in split], np.int8)
    note = f"labels such as {printable(next(text for text in texts if SEVERAL in text)[:80])} are {_AS_TAGS}"
    return ReadLabels(None, classes, note, tags)


def _from_numbers(numbers: Labels) -> ReadLabels:
    numbers = np.maximum(numbers, -1)
    if numbers.max(initial=-1) <= _LARGEST:
        return ReadLabels(numbers)
    different, inverse = np.unique(numbers, return_inverse=True)
    unknown = int(different[0] < 0)
    return ReadLabels(inverse.astype(np.int64) - unknown, tuple(map(str, different[unknown:].tolist())))


def ordered_classes(training: Iterable[str], others: Iterable[str] = ()) -> tuple[str, ...]:
    """Names of classes in the order of their numbers, training's first; as text, or by value where all are digits."""
    first, later = set(training), set(others)
    key = int if all(name.isascii() and name.isdigit() for name in first | later) else str
    return (*sorted(first, key=key), *sorted(later - first, key=key))


def in_training_classes(source: Source, train: Source, what: str) -> tuple[Source, tuple[str, ...]]:
    """Held-out images with labels that are numbers of the training images' classes.

    Classes are matched by name, or by number where one side has no names. What training lacks is -1, and noted.
    """
    if source.labels is None or train.labels is None:
        return source, ()
    trained = set(np.unique(train.labels).tolist())
    number_of = {name: number for number, name in enumerate(train.classes or ())}
    different, inverse = np.unique(np.maximum(source.labels, -1), return_inverse=True)
    found = [_number_in(value, source.classes, number_of) for value in different.tolist()]
    numbers = np.array([number if number in trained else -1 for number in found], dtype=np.int64)
    notes: tuple[str, ...] = ()
    if (lost := (different >= 0) & (numbers < 0)).any():
        names = [_class_name(value, source.classes) for value in different[lost][:_NAMED].tolist()]
        count = f"{int(lost[inverse].sum()):,} of {len(source):,} {what} images are left out of figures of classes"
        notes = (f"{count}: training has no {', '.join(names)}{', ...' if lost.sum() > _NAMED else ''}",)
    labels = numbers[inverse]
    if source.classes == train.classes and np.array_equal(labels, source.labels):
        return source, notes
    return relabelled(source, labels, train.classes), notes


def _class_name(number: int, classes: Sequence[str] | None) -> str:
    return classes[number] if classes is not None and number < len(classes) else str(number)


def _number_in(value: int, classes: Sequence[str] | None, number_of: Mapping[str, int]) -> int:
    """The number of a label among the classes of the training images; -1 where none is like it."""
    name = _class_name(value, classes)
    if value < 0 or name in number_of:
        return number_of.get(name, -1)
    if classes is None:  # numbers beside names, or among other numbers
        return -1 if number_of and all(map(str.isdigit, number_of)) else value
    return int(name) if not number_of and name.isascii() and name.isdigit() else -1


def in_one_list(splits: Mapping[str, Source]) -> dict[str, Source]:
    """The same splits with one list of classes, for a format that can hold no more than one."""
    named = [source.classes for source in splits.values() if source.classes is not None]
    if not named or all(names == named[0] for names in named):
        return dict(splits)
    training = splits["train"].classes or ()
    added = dict.fromkeys(name for names in named for name in names if name not in training)
    number_of = {name: number for number, name in enumerate((*training, *added))}
    joined = dict(splits)
    for split, source in splits.items():
        if source.classes is not None and source.labels is not None:
            table = np.array([*(number_of[name] for name in source.classes), -1], dtype=np.int64)
            joined[split] = relabelled(source, table[np.maximum(source.labels, -1)], tuple(number_of))
    return joined


def relabelled(source: Source, labels: Labels, classes: tuple[str, ...] | None) -> Source:
    """The same samples with other labels, (N,)."""
    same = copy.copy(source)
    same.labels, same.classes = labels, classes
    return same
