"""Writes the files of a packed data set, each read back before it counts."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image as Pillow

from torchmae.data.arrays import map_array
from torchmae.data.formats import Image
from torchmae.data.parquet import ParquetTable, import_pyarrow
from torchmae.data.shards import INDEX_SUFFIX, build_index, write_index
from torchmae.data.sources import Source
from torchmae.errors import ConfigError, DataError
from torchmae.files import replace_file

_ROWS = 100  # of a row group of parquet
_PARTIAL = ".partial"
_HEADER = 128  # bytes before the values of a .npy file, as NumPy writes it with room for any number of images


@dataclass(frozen=True)
class Record:
    """One image to write.

    Attributes:
        index: in its source.
        name: where it is from.
        label: -1 where unknown.
        content: an encoded image, or (for arrays) its values; None: it cannot be read.
        failure: why it cannot be read.
    """

    index: int
    name: str
    label: int
    content: bytes | Image | None
    failure: str | None


class PackedFile(NamedTuple):
    """A file, or a part of one, that is whole and was read back.

    Attributes:
        split: it belongs to.
        name: of the file.
        stop: index in the source after the last image in it.
        images: in it.
        digest: of their bytes and labels.
        labels: of its images, where nothing else holds them.
        nbytes: of the file, up to the end of the part; None: packed by a version that did not note it.
    """

    split: str
    name: str
    stop: int
    images: int
    digest: str
    labels: list[int] | None = None
    nbytes: int | None = None


class Digest:
    """A digest of images in an order."""

    def __init__(self) -> None:
        self._state = hashlib.blake2b(digest_size=16)

    def add(self, content: bytes | memoryview, label: int) -> None:
        """Takes in one image."""
        self._state.update(f"{len(content)},{label}\n".encode())
        self._state.update(content)

    def value(self) -> str:
        """32 hexadecimal digits."""
        return self._state.hexdigest()


class Writer(ABC):
    """Writes the images of one split into files.

    Args:
        out: the folder.
        split: whose images they are.
        source: the images.
        done: what is whole already.
        limit: bytes after which a file (or a part of one) is closed.
    """

    def __init__(self, out: Path, split: str, source: Source, done: Sequence[PackedFile], limit: int) -> None:
        self.out = out
        self.split = split
        self.source = source
        self.done = list(done)
        self.limit = limit
        self.next = done[-1].stop if done else 0
        self._size = 0
        self._images = 0
        self._digest = Digest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.abandon()
        if isinstance(error, OSError):
            raise DataError(f"cannot write to {self.out}: {error.strerror or error}", "free space, then run it again")

    def add(self, record: Record) -> PackedFile | None:
        """Writes an image; returns the file that it filled."""
        self.next = record.index + 1
        if record.content is None:
            return None
        raw = record.content if isinstance(record.content, bytes) else _plain(record.content).data.cast("B")
        self.write(record)
        self._digest.add(raw, record.label)
        self._size += len(raw)
        self._images += 1
        return self.close_part() if self._size >= self.limit else None

    def finish(self) -> list[PackedFile]:
        """Closes the last file (or part of one)."""
        return [self.close_part()] if self._images else []

    def settle(self) -> None:
        """Does what is left when every part has been noted as whole."""
        return

    def close_part(self) -> PackedFile:
        """Closes a file, compares what it holds with what was to be written, and gives it its name."""
        name, found, labels = self.seal()
        if found != self._digest.value():
            raise DataError(f"{self.out / name} does not hold what was written", "check the disk, then run it again")
        nbytes = self.commit()
        part = PackedFile(self.split, name, self.next, self._images, found, labels, nbytes)
        self.done.append(part)
        self._size, self._images, self._digest = 0, 0, Digest()
        return part

    @abstractmethod
    def write(self, record: Record) -> None:
        """Puts an image into the file under way."""

    @abstractmethod
    def seal(self) -> tuple[str, str, list[int] | None]:
        """Ends the file under way: its final name, the digest of what can be read from it, and labels to keep."""

    @abstractmethod
    def commit(self) -> int:
        """Gives the file its name, and returns how many bytes it has."""

    def check_done(self) -> None:
        """DataError unless what is noted as whole is there, and of the size that it had."""
        for part in self.done:
            self._check_size(self.out / part.name, part.nbytes)

    def _check_size(self, path: Path, nbytes: int | None) -> None:
        size = path.stat().st_size if path.is_file() else None
        if size is None or (nbytes is not None and size != nbytes):
            what = "is gone" if size is None else f"has {size:,} bytes and had {nbytes:,}"
            raise DataError(f"{path} {what}, though it was packed before", "remove the folder, and pack again")

    @abstractmethod
    def abandon(self) -> None:
        """Closes what is open and removes what is not whole."""


class _FileWriter(Writer):
    """A writer whose parts are files of their own."""

    suffix: str

    def __init__(self, out: Path, split: str, source: Source, done: Sequence[PackedFile], limit: int) -> None:
        super().__init__(out, split, source, done, limit)
        self._opened: Any = None

    @property
    def path(self) -> Path:
        """Of the file under way, once it is whole."""
        return self.out / f"{self.split}-{len(self.done):06d}{self.suffix}"

    @property
    def partial(self) -> Path:
        """Of the file under way."""
        return self.path.with_name(self.path.name + _PARTIAL)

    def seal(self) -> tuple[str, str, list[int] | None]:
        """As in `Writer`."""
        self._opened.close()
        self._opened = None
        _flush(self.partial)
        found = Digest()
        for content, label in self.read_back():
            found.add(content, label)
        return self.path.name, found.value(), None

    @abstractmethod
    def read_back(self) -> Iterator[tuple[bytes, int]]:
        """The images and labels in the file that was just closed."""

    def commit(self) -> int:
        """As in `Writer`."""
        self.partial.replace(self.path)
        return self.path.stat().st_size

    def abandon(self) -> None:
        """Closes what is open; the rows that are whole stay."""
        if self._opened is not None:
            with suppress(Exception):  # the error that led here is the one to report
                self._opened.close()
        with suppress(OSError):
            self.partial.unlink()


class ParquetWriter(_FileWriter):
    """Parquet files in the schema of the `datasets` library."""

    suffix = ".parquet"

    def __init__(self, out: Path, split: str, source: Source, done: Sequence[PackedFile], limit: int) -> None:
        super().__init__(out, split, source, done, limit)
        self._arrow, self._parquet = import_pyarrow()
        self._rows: list[dict[str, Any]] = []

    def _schema(self) -> Any:
        features: dict[str, Any] = {"image": {"_type": "Image"}}
        fields = [("image", self._arrow.struct([("bytes", self._arrow.binary()), ("path", self._arrow.string())]))]
        if self.source.labels is not None:
            fields.append(("label", self._arrow.int64()))
            names = self.source.classes
            features["label"] = (
                {"dtype": "int64", "_type": "Value"} if names is None else {"names": list(names), "_type": "ClassLabel"}
            )
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        return self._arrow.schema(fields, metadata=metadata)

    def write(self, record: Record) -> None:
        """As in `Writer`."""
        if self._opened is None:
            self._opened = self._parquet.ParquetWriter(
                self.partial, self._schema(), compression="none", use_dictionary=False
            )
        row: dict[str, Any] = {"image": {"bytes": record.content, "path": PurePath(record.name).name}}
        if self.source.labels is not None:
            row["label"] = record.label
        self._rows.append(row)
        if len(self._rows) == _ROWS:
            self._write_rows()

    def _write_rows(self) -> None:
        self._opened.write_table(self._arrow.Table.from_pylist(self._rows, self._schema()))
        self._rows = []

    def seal(self) -> tuple[str, str, list[int] | None]:
        """As in `Writer`."""
        if self._rows:
            self._write_rows()
        return super().seal()

    def read_back(self) -> Iterator[tuple[bytes, int]]:
        """As in `_FileWriter`."""
        table = ParquetTable(self.partial)
        labels = [-1] * table.num_rows if table.label is None else table.labels().tolist()
        images = (content for batch in table.images() for content in batch)
        yield from zip(images, labels, strict=True)


class ShardWriter(_FileWriter):
    """WebDataset shards, each with its index beside it."""

    suffix = ".tar"

    def write(self, record: Record) -> None:
        """As in `Writer`."""
        assert isinstance(record.content, bytes)
        if self._opened is None:
            self._opened = tarfile.open(self.partial, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (many images)
        key = f"{record.index:09d}"
        self._member(f"{key}.{_extension(record.content)}", record.content)
        if self.source.labels is not None and record.label >= 0:
            self._member(f"{key}.cls", str(record.label).encode())

    def _member(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._opened.addfile(member, io.BytesIO(content))

    def read_back(self) -> Iterator[tuple[bytes, int]]:
        """As in `_FileWriter`."""
        index = build_index(self.partial, self.partial.stat().st_size)
        with self.partial.open("rb") as file:
            for offset, size, label in zip(index.offsets, index.sizes, index.labels, strict=True):
                file.seek(int(offset))
                yield file.read(int(size)), int(label)
        write_index(self.path.with_name(self.path.name + INDEX_SUFFIX), index, self.partial.stat().st_size)


class ArrayWriter(Writer):
    """One .npy file of images and one of labels, named as in an .npz file; each part is some rows more."""

    def __init__(self, out: Path, split: str, source: Source, done: Sequence[PackedFile], limit: int) -> None:
        super().__init__(out, split, source, done, limit)
        self.path = out / f"{split}_images.npy"
        self.partial = self.path.with_name(self.path.name + _PARTIAL)
        self._labels_path = out / f"{split}_labels.npy"
        self._rows = sum(part.images for part in done)
        self._labels = [label for part in done for label in part.labels or []]
        self._new_labels: list[int] = []
        self._first: Record | None = None
        self._file: Any = None
        self._row_bytes = 0

    def write(self, record: Record) -> None:
        """As in `Writer`."""
        assert isinstance(record.content, np.ndarray)
        if self._file is None:
            self._begin(record)
        self._check(record)
        self._file.write(_plain(record.content).data.cast("B"))
        self._new_labels.append(record.label)

    def _begin(self, record: Record) -> None:
        """Opens the file behind the rows that are whole."""
        assert isinstance(record.content, np.ndarray)
        self._first = record
        self._row_bytes = record.content.nbytes
        self._file = self.partial.open("r+b" if self._rows else "w+b")
        whole = _HEADER + self._rows * self._row_bytes
        if self._file.seek(0, io.SEEK_END) < whole:
            if self._rows:
                raise DataError(f"{self.partial} has lost rows", "remove the folder, and pack again")
            self._file.write(bytes(_HEADER))
        self._file.truncate(whole)
        self._file.seek(whole)

    def _check(self, record: Record) -> None:
        assert self._first is not None
        first, content = self._first.content, record.content
        assert isinstance(first, np.ndarray) and isinstance(content, np.ndarray)
        if first.shape != content.shape or first.dtype != content.dtype:
            described = [
                f"{item.name} is {'x'.join(map(str, image.shape))} {image.dtype}"
                for item, image in ((self._first, first), (record, content))
            ]
            raise ConfigError(f"one array cannot hold them: {', '.join(described)}", "choose the format parquet or wds")

    def seal(self) -> tuple[str, str, list[int] | None]:
        """As in `Writer`."""
        self._file.flush()
        found = Digest()
        self._file.seek(_HEADER + self._rows * self._row_bytes)
        for label in self._new_labels:
            found.add(self._file.read(self._row_bytes), label)
        return self.path.name, found.value(), self._new_labels

    def commit(self) -> int:
        """As in `Writer`."""
        assert self._first is not None and isinstance(self._first.content, np.ndarray)
        self._rows += len(self._new_labels)
        self._labels += self._new_labels
        self._new_labels = []
        self._file.seek(0)
        self._file.write(_npy_header((self._rows, *self._first.content.shape), _plain(self._first.content).dtype))
        self._file.flush()
        os.fsync(self._file.fileno())
        return int(self._file.seek(0, io.SEEK_END))

    def check_done(self) -> None:
        """As in `Writer`."""
        if self.done and not self.partial.exists():  # whose rows are counted where more are added
            self._check_size(self.path, self.done[-1].nbytes)
            if self.source.labels is not None:
                self._check_size(self._labels_path, None)

    def settle(self) -> None:
        """Gives the file its name."""
        self.abandon()
        if not self.partial.exists():  # all was done already
            return
        if len(map_array(self.partial)) != self._rows:
            raise DataError(f"{self.partial} has lost rows", "remove the folder, and pack again")
        if self.source.labels is not None:
            labels = np.array(self._labels, dtype=np.int64)
            replace_file(self._labels_path, lambda file: np.save(file, labels), DataError)
        self.partial.replace(self.path)

    def abandon(self) -> None:
        """Closes what is open; the rows that are whole stay."""
        if self._file is not None:
            with suppress(Exception):  # the error that led here is the one to report
                self._file.close()


def _npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    header = buffer.getvalue()
    assert len(header) == _HEADER
    return header


def _plain(image: Image) -> Image:
    """Contiguous and little-endian, as it is stored."""
    return np.ascontiguousarray(image, dtype=image.dtype.newbyteorder("<"))


def _extension(content: bytes) -> str:
    """The suffix of an image file by its first bytes."""
    with Pillow.open(io.BytesIO(content)) as image:
        name = (image.format or "").lower()
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(name, name)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


WRITERS: dict[str, Callable[[Path, str, Source, Sequence[PackedFile], int], Writer]] = {
    "parquet": ParquetWriter,
    "wds": ShardWriter,
    "npy": ArrayWriter,
}
"""The formats."""


def open_writer(format: str, out: Path, split: str, source: Source, done: Sequence[PackedFile], limit: int) -> Writer:
    """A writer of a format in `WRITERS`; the other arguments are those of `Writer`."""
    return WRITERS[format](out, split, source, done, limit)
