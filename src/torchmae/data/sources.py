"""What samples come from: a `Source` opens each as an `Item`, whatever it lies in."""

from __future__ import annotations

import copy
import hashlib
import os
import stat
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from torchmae.data.formats import Context, Image, Item, Progress, open_item
from torchmae.data.labels import Labels, ReadLabels, read_labels
from torchmae.errors import DataError, printable

if TYPE_CHECKING:
    from torchmae.data.folders import Masks

MAX_BYTES = 512 * 2**20  # of an image file: as many as a hundred million pixels seldom take

_SIZES_ASKED = 10_000


class Strings:
    """Byte strings in one buffer: a million file names take 30 MB, and worker processes share them."""

    def __init__(self, values: Iterable[bytes] = ()) -> None:
        self._content, self._ends = bytearray(), array("q")
        for value in values:
            self.add(value)

    @classmethod
    def of(cls, content: bytes, ends: npt.NDArray[np.int64]) -> Strings:
        """The strings that end at `ends` (rising) within `content`."""
        strings = cls()
        strings._content, strings._ends = bytearray(content), array("q", ends.tobytes())
        return strings

    @property
    def parts(self) -> tuple[bytearray, npt.NDArray[np.int64]]:
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
    classes: tuple[str, ...] | None = None  # the name of each label, where known
    remarks: tuple[str, ...] = ()  # what was assumed or left out, a short phrase each: "3 .heic files not used"

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def open(self, index: int) -> Item:
        """One sample, its header read; DataError with the reason, without the sample's name."""

    def open_page(self, index: int, page: int) -> Item:  # noqa: ARG002
        """One page of a sample's file, from 0."""
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
        try:
            return self.open(index).read()
        except DataError as error:
            raise DataError(f"{self.name(index)}: {error.problem}", error.fix) from None

    def _take_labels(self, labels: npt.ArrayLike | None, classes: Sequence[str] | None) -> None:
        """Sets labels and classes from any form that they are stored in (`read_labels`)."""
        read = ReadLabels(None) if labels is None else read_labels(labels, len(self))
        self.labels = read.labels
        self.classes = read.classes or (None if classes is None or read.note else tuple(classes))
        self.remarks += (read.note,) if read.note else ()

    def label_fingerprint(self) -> str:
        """A hexadecimal digest that changes when labels or classes do; "" without labels."""
        return "" if self.labels is None else digest([np.ascontiguousarray(self.labels), *(self.classes or ())])

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
        """As in `Source`."""
        return open_item(self.encoded(index), self.context, lambda: self.name(index))

    def open_page(self, index: int, page: int) -> Item:
        """As in `Source`."""
        return open_item(self.encoded(index), replace(self.context, page=page), lambda: self.name(index))

    def with_channels(self, channels: int) -> Self:
        """The same samples; grey and colour are converted, a sample with another number cannot be opened."""
        same = copy.copy(self)
        same.context = replace(self.context, channels=channels)
        return same


class FileSource(EncodedSource):
    """Encoded files on a disk: `names` are paths relative to `root`, with "/"; labels in any form of `read_labels`."""

    masks: Masks | None = None  # beside the files

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

    def encoded(self, index: int) -> bytes:
        """As in `EncodedSource`."""
        try:
            path = self._path(index)
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a pipe would block, a device never end
                raise DataError("no regular file")
            with path.open("rb") as file:
                return check_size(file.read(MAX_BYTES + 1))
        except (OSError, ValueError) as error:  # ValueError: a null byte in a path
            raise DataError(getattr(error, "strerror", None) or str(error)) from None

    def name(self, index: int) -> str:
        """The path of the file."""
        return printable(os.fsencode(self._path(index)))

    def fingerprint(self) -> str:
        """Of all names, and of the sizes of at most 10,000 files: on a network, a million take minutes."""
        sizes = (_status(self._path(int(i)), "st_size") for i in evenly_spaced(len(self), _SIZES_ASKED))
        return digest([*self._names.parts, *sizes])

    def stamp(self) -> str:
        """Of the time of each file's last change, in nanoseconds."""
        return digest(_status(self._path(i), "st_mtime_ns") for i in range(len(self)))


def check_size(raw: bytes) -> bytes:
    """The bytes of an image file; DataError where there are more than MAX_BYTES."""
    if len(raw) > MAX_BYTES:
        raise DataError(f"the file has more than {MAX_BYTES // 2**20:,} MiB")
    return raw


def _status(path: Path, field: str) -> int:
    """A field of a file's status; -1 where there is no file."""
    try:
        return int(getattr(path.stat(), field))
    except (OSError, ValueError):
        return -1


class Subset(Source):
    """The samples of a source at (M,) `indices`, in this order; `labels` (M,) and `classes` replace its own."""

    def __init__(
        self,
        source: Source,
        indices: npt.NDArray[np.int64],
        labels: Labels | None = None,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self.source = source
        self.indices = indices
        own = None if source.labels is None else source.labels[indices]
        self.labels = own if labels is None else labels
        self.classes = source.classes if labels is None else classes
        self.remarks = source.remarks

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, index: int) -> Item:
        """As in `Source`."""
        return self.source.open(int(self.indices[index]))

    def open_page(self, index: int, page: int) -> Item:
        """As in `Source`."""
        return self.source.open_page(int(self.indices[index]), page)

    def encoded(self, index: int) -> bytes | None:
        """As in `Source`."""
        return self.source.encoded(int(self.indices[index]))

    def name(self, index: int) -> str:
        """As in `Source`."""
        return self.source.name(int(self.indices[index]))

    def fingerprint(self) -> str:
        """Of the source's and the indices."""
        return digest([self.source.fingerprint(), np.ascontiguousarray(self.indices)])

    def stamp(self) -> str:
        """As in `Source`."""
        return self.source.stamp()

    def with_channels(self, channels: int) -> Subset:
        """As in `Source`."""
        same = copy.copy(self)
        same.source = self.source.with_channels(channels)
        return same

    def whole(self) -> tuple[Image, npt.NDArray[np.int64] | None] | None:
        """As in `Source`."""
        found = self.source.whole()
        if found is None:
            return None
        images, rows = found
        return images, self.indices if rows is None else rows[self.indices]

    def read_ahead(self, indices: npt.NDArray[np.int64]) -> None:
        """As in `Source`."""
        self.source.read_ahead(self.indices[indices])


class EachPage(Subset):
    """Every page of a source's files as a sample of its own; file i has `counts[i]` pages."""

    def __init__(self, source: Source, counts: npt.NDArray[np.int64]) -> None:
        super().__init__(source, np.repeat(np.arange(len(counts)), counts))
        self._pages = np.concatenate([np.arange(count) for count in counts])
        self.remarks = (*source.remarks, f"{len(self):,} pages of {len(counts):,} files, each a sample")

    def open(self, index: int) -> Item:
        """As in `Source`."""
        return self.source.open_page(int(self.indices[index]), int(self._pages[index]))

    def encoded(self, index: int) -> bytes | None:  # noqa: ARG002
        """None: the file holds other pages too."""
        return None

    def name(self, index: int) -> str:
        """The file and the page, from 1."""
        return f"{super().name(index)}, page {self._pages[index] + 1}"


def each_page(source: Source, progress: Progress | None) -> Source:
    """A source whose samples are the pages of the files; the source itself where each file has one page."""
    counts = np.ones(len(source), dtype=np.int64)
    for index in range(len(source)):
        with suppress(DataError):  # which says so again when it is read
            counts[index] = source.open(index).meta.get("pages", 1)
        if progress is not None and ((index + 1) % 1000 == 0 or index + 1 == len(source)):
            progress("counting pages", index + 1, len(source))
    return source if (counts == 1).all() else EachPage(source, counts)
