"""What samples come from: a `Source` opens each as an `Item`, whatever it lies in."""

from __future__ import annotations

import copy
import hashlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from torchmae.data.folders import Masks
from torchmae.data.formats import Context, Image, Item, Progress, open_item
from torchmae.data.labels import Labels, ReadLabels, read_labels
from torchmae.data.strings import Strings, pack_strings
from torchmae.errors import DataError

MAX_BYTES = 512 * 2**20
"""Largest image file that is read: as many bytes as a hundred million pixels seldom take."""

_SIZES_ASKED = 10_000


class Source(ABC):
    """Samples in a fixed order, with labels where there are any.

    Attributes:
        labels: (N,), -1 where unknown; None where nothing has a label.
        classes: the name of each label, where known.
        remarks: what was assumed or left out when it was opened, a short phrase each: "3 .heic files not used".
    """

    labels: Labels | None = None
    classes: tuple[str, ...] | None = None
    remarks: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are."""

    @abstractmethod
    def open(self, index: int) -> Item:
        """One sample, its header read; DataError with the reason, without its name, where it cannot be opened."""

    def open_page(self, index: int, page: int) -> Item:  # noqa: ARG002
        """One page of a sample's file, from 0."""
        return self.open(index)

    @abstractmethod
    def name(self, index: int) -> str:
        """Where a sample is from, for messages: a path, or "digits/17"."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hexadecimal digest that changes when samples are added, removed, renamed or replaced."""

    @abstractmethod
    def with_channels(self, channels: int) -> Source:
        """The same samples read with so many channels; ConfigError where that cannot be."""

    def read(self, index: int) -> Image:
        """The values of a sample, (*size, C) uint8, uint16 or float32; DataError, which names it, if unreadable."""
        try:
            return self.open(index).read()
        except DataError as error:
            raise DataError(f"{self.name(index)}: {error.problem}", error.fix) from None

    def notes(self) -> list[str]:
        """What was assumed, decided or left out, a short phrase each, without the values' own (`reading.survey`)."""
        return list(self.remarks)

    def _take_labels(self, labels: npt.ArrayLike | None, classes: Sequence[str] | None) -> None:
        """Sets labels and classes from whatever form they are stored in (`labels.read_labels`)."""
        read = ReadLabels(None) if labels is None else read_labels(labels, len(self))
        self.labels = read.labels
        self.classes = read.classes or (None if classes is None or read.note else tuple(classes))
        self.remarks = (*self.remarks, *([read.note] if read.note else []))

    def label_fingerprint(self) -> str:
        """A hexadecimal digest that changes when labels or classes do; "" where there are none."""
        return "" if self.labels is None else digest([np.ascontiguousarray(self.labels), *(self.classes or ())])

    def stamp(self) -> str:
        """What changes when a file is replaced by one of the same name and size; "" where nothing tells."""
        return ""

    def encoded(self, index: int) -> bytes | None:  # noqa: ARG002
        """The bytes of a sample's file; None: it is in none of its own. DataError without the name."""
        return None

    def whole(self) -> tuple[Image, npt.NDArray[np.int64] | None] | None:
        """All samples where they lie in memory as one array: (M, *size, C) and the row of each, None if in order."""
        return None

    def read_ahead(self, indices: npt.NDArray[np.int64]) -> None:  # noqa: B027 (most have nothing to do)
        """Starts to bring these samples near; returns at once, and fails for none of them."""

    def subset(self, indices: npt.NDArray[np.int64]) -> Source:
        """Some of the samples, in this order."""
        return Subset(self, indices)


def all_notes(splits: Mapping[str, Source]) -> list[str]:
    """The notes of all splits, each once."""
    return list(dict.fromkeys(note for source in splits.values() for note in source.notes()))


def data_line(notes: Iterable[str]) -> str:
    """The line that says what was assumed, decided or left out; "" where nothing was."""
    said = "; ".join(dict.fromkeys(notes))
    return f"data: {said}" if said else ""


def digest(parts: Iterable[object]) -> str:
    """32 hexadecimal digits of the texts (or bytes, or contiguous arrays) of `parts`, the same on every machine."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        is_plain = isinstance(part, (bytes, bytearray, np.ndarray))
        state.update(part if is_plain else str(part).encode("utf-8", "backslashreplace"))  # type: ignore[arg-type]
        state.update(b"\0")
    return state.hexdigest()


def spread(length: int, count: int) -> npt.NDArray[np.int64]:
    """At most `count` different indices below `length`, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))


class EncodedSource(Source):
    """Samples that are stored as encoded files, whatever those lie in, and decoded when they are read.

    Args:
        labels: (N,) integers, -1 where unknown.
        classes: the name of each label.
        context: how they are decoded.
    """

    def __init__(
        self,
        length: int,
        labels: npt.ArrayLike | None,
        classes: Sequence[str] | None,
        context: Context,
    ) -> None:
        self.context = context
        self._length = length
        self._take_labels(labels, classes)

    def __len__(self) -> int:
        return self._length

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The bytes of a sample's file; DataError with the reason, without the name, where they cannot be had."""

    def file_name(self, index: int) -> str:
        """A name whose suffix tells the format where the content does not."""
        return self.name(index)

    def open(self, index: int) -> Item:
        """As in `Source`."""
        return open_item(self.encoded(index), self.context, lambda: self.file_name(index))

    def open_page(self, index: int, page: int) -> Item:
        """As in `Source`."""
        return open_item(self.encoded(index), replace(self.context, page=page), lambda: self.file_name(index))

    def with_channels(self, channels: int) -> Self:
        """The same samples; one that has another number, and is neither grey nor colour, cannot be opened."""
        same = copy.copy(self)
        same.context = replace(self.context, channels=channels)
        return same


class FileSource(EncodedSource):
    """Encoded files on a disk.

    Args:
        root: the folder that `names` are relative to.
        names: paths of the files, with "/".
        labels: (N,) integers, -1 where unknown.
        classes: the name of each label.
        context: how they are decoded.
        remarks: as in `Source`.

    Attributes:
        masks: the masks beside the files; None: there are none.
    """

    masks: Masks | None = None

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
        self._names = names if isinstance(names, Strings) else pack_strings(os.fsencode(name) for name in names)
        self.remarks = tuple(remarks)

    def _path(self, index: int) -> Path:
        return self._root / os.fsdecode(self._names[index])

    def encoded(self, index: int) -> bytes:
        """The content of the file."""
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
        """Of the names of all files, and the sizes of 10,000 at most: on a network, a million take minutes."""
        sizes = (file_size(self._path(int(i))) for i in spread(len(self), _SIZES_ASKED))
        return digest([*self._names.parts, *sizes])

    def stamp(self) -> str:
        """Of when each file was changed."""
        return digest(_changed(self._path(i)) for i in range(len(self)))


def printable(name: bytes) -> str:
    """A name as one line of text: what is not printable (line ends, a terminal's escape codes) is escaped."""
    text = name.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def check_size(raw: bytes) -> bytes:
    """Returns the bytes of an image file; DataError when there are more than MAX_BYTES."""
    if len(raw) > MAX_BYTES:
        raise DataError(f"the file has more than {MAX_BYTES // 2**20:,} MiB")
    return raw


def _changed(path: Path) -> int:
    """When a file was changed, in nanoseconds; -1 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except (OSError, ValueError):
        return -1


def file_size(path: Path) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return -1


class Subset(Source):
    """Some of a source's samples.

    Args:
        source: the samples.
        indices: (M,) which of them, in this order.
        labels: (M,) labels to put in place of the source's own.
        classes: the names of `labels`; only with them.
    """

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
        """The source's."""
        return self.source.open(int(self.indices[index]))

    def open_page(self, index: int, page: int) -> Item:
        """The source's."""
        return self.source.open_page(int(self.indices[index]), page)

    def encoded(self, index: int) -> bytes | None:
        """The source's."""
        return self.source.encoded(int(self.indices[index]))

    def name(self, index: int) -> str:
        """The source's."""
        return self.source.name(int(self.indices[index]))

    def fingerprint(self) -> str:
        """Of the source's and the indices."""
        return digest([self.source.fingerprint(), np.ascontiguousarray(self.indices)])

    def stamp(self) -> str:
        """The source's."""
        return self.source.stamp()

    def with_channels(self, channels: int) -> Subset:
        """The same subset of the source with `channels`."""
        same = copy.copy(self)
        same.source = self.source.with_channels(channels)
        return same

    def whole(self) -> tuple[Image, npt.NDArray[np.int64] | None] | None:
        """The source's, and which of its rows these are."""
        found = self.source.whole()
        if found is None:
            return None
        images, rows = found
        return images, self.indices if rows is None else rows[self.indices]

    def read_ahead(self, indices: npt.NDArray[np.int64]) -> None:
        """Tells the source."""
        self.source.read_ahead(self.indices[indices])


class EachPage(Subset):
    """Every page of a source's files as a sample of its own.

    Args:
        source: the files.
        counts: (N,) how many pages each has.
    """

    def __init__(self, source: Source, counts: npt.NDArray[np.int64]) -> None:
        super().__init__(source, np.repeat(np.arange(len(counts)), counts))
        self._pages = np.concatenate([np.arange(count) for count in counts])
        self.remarks = (*source.remarks, f"{len(self):,} pages of {len(counts):,} files, each a sample")

    def open(self, index: int) -> Item:
        """One page."""
        return self.source.open_page(int(self.indices[index]), int(self._pages[index]))

    def encoded(self, index: int) -> bytes | None:  # noqa: ARG002
        """None: the file holds other pages too."""
        return None

    def name(self, index: int) -> str:
        """The file and the page, from 1."""
        return f"{super().name(index)}, page {self._pages[index] + 1}"


def each_page(source: Source, progress: Progress | None) -> Source:
    """A source whose samples are the pages of the files; the source itself where each has one."""
    counts = np.ones(len(source), dtype=np.int64)
    for index in range(len(source)):
        with suppress(DataError):  # which says so again when it is read
            counts[index] = source.open(index).meta.get("pages", 1)
        if progress is not None and ((index + 1) % 1000 == 0 or index + 1 == len(source)):
            progress("counting pages", index + 1, len(source))
    return source if (counts == 1).all() else EachPage(source, counts)
