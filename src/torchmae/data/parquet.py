"""Encoded images in parquet files, with the columns of the Hugging Face `datasets` library."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from torchmae.data.cache import cache_folder, cache_limit, hold_open, remove_unless_open, trim
from torchmae.data.formats import Context, Progress
from torchmae.data.remote import Place, last_name, open_place, place_version
from torchmae.data.sources import EncodedSource, check_size, digest
from torchmae.errors import ConfigError, DataError
from torchmae.files import lock_file, replace_file

IN_MEMORY = 256 * 2**20
"""Bytes of encoded images up to which tables are kept in memory; each worker process has a copy of them."""

_ROWS = 256  # read at a time
_LOOK_EVERY_S = 0.2  # while another process unpacks


class ParquetSource(EncodedSource):
    """Encoded images in parquet files, in the order of the files and of the rows in them.

    Up to `IN_MEMORY` bytes are kept in memory. A parquet file is no format for random access, so larger tables are
    unpacked once, into a file in the cache folder that is mapped into memory. Paths that a table names are never
    opened.

    Args:
        files: parquet files (or their URLs) with one and the same schema: a column of images (a struct with `bytes`,
            or plain binary), and integers called label, labels or fine_label.
        context: how the images are read.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: a file that is not parquet, or has no column of images.
    """

    def __init__(self, files: Sequence[Place], context: Context = Context()) -> None:
        self._names = [last_name(file) for file in files]
        tables = [ParquetTable(file) for file in files]
        self._versions = [place_version(file) for file in files]
        self._starts = np.cumsum([0] + [table.num_rows for table in tables])  # first row of each file
        first = tables[0]
        for table in tables:
            if (table.leaf, table.label) != (first.leaf, first.label):
                raise DataError(
                    f"{last_name(table.file)} has other columns than {self._names[0]}", "give files of one data set"
                )
        labels = None if first.label is None else np.concatenate([table.labels() for table in tables])
        names = None if first.label is None else _label_names(first.metadata, first.label)
        self.remarks = (first.note,) if first.note else ()
        super().__init__(int(self._starts[-1]), labels, names, context)
        if not len(self):
            raise DataError(f"{self._names[0]} holds no rows", "give a table of images")
        self._encoded = _load(tables, self._versions, context.progress)

    def encoded(self, index: int) -> bytes:
        """The bytes in the table."""
        raw = self._encoded[index]
        if not raw:
            raise DataError("the table holds no bytes for it")
        return check_size(raw)

    def name(self, index: int) -> str:
        """The file and the row in it."""
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self._names[file]}/{index - self._starts[file]}"

    def fingerprint(self) -> str:
        """Of the names and sizes of the files."""
        return digest([list(zip(self._names, [size for size, _ in self._versions], strict=True)), len(self)])

    def stamp(self) -> str:
        """Of the versions of the files."""
        return digest(self._versions)


class ParquetTable:
    """One parquet file, read from its beginning to its end.

    Attributes:
        leaf: the column of bytes, as parquet names it ("image.bytes").
        label: the column of labels, if there is one.
        note: what to say of a column of labels that is not used, else "".
        metadata: what stands beside the schema.
        file: where it is.
        num_rows: images in it.
        nbytes: of its encoded images, roughly.
    """

    def __init__(self, file: Place) -> None:
        arrow, parquet = import_pyarrow()
        self.file = file
        self._failures = (OSError, arrow.ArrowException)
        self._arrow, self._parquet = arrow, parquet
        try:
            with open_place(file) as opened, parquet.ParquetFile(opened) as table:
                schema, facts = table.schema_arrow, table.metadata
        except self._failures as error:
            raise self._unreadable(error) from error
        self.metadata: dict[bytes, bytes] | None = schema.metadata
        self.leaf = _image_leaf(arrow, schema)
        self.label, self.note = _label_column(arrow, schema)
        self.num_rows: int = facts.num_rows
        column = next(i for i in range(facts.num_columns) if facts.schema.column(i).path == self.leaf)
        self.nbytes = sum(
            facts.row_group(i).column(column).total_uncompressed_size for i in range(facts.num_row_groups)
        )

    def labels(self) -> npt.NDArray[Any]:
        """(N,) integers, floats or texts; -1, NaN or "" where the table says nothing."""
        try:
            with open_place(self.file) as opened:
                column = self._parquet.read_table(opened, columns=[self.label]).column(0)
                labels: npt.NDArray[Any] = label_values(column)
        except self._failures as error:
            raise self._unreadable(error) from error
        return labels

    def images(self) -> Iterator[list[bytes]]:
        """The encoded images, some rows at a time; b"" where there is none."""
        try:
            with open_place(self.file) as opened, self._parquet.ParquetFile(opened) as table:
                for batch in table.iter_batches(_ROWS, columns=[self.leaf]):
                    column = batch.column(0)
                    values = column.field("bytes") if self._arrow.types.is_struct(column.type) else column
                    yield [value or b"" for value in values.to_pylist()]
        except self._failures as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(f"cannot read {self.file}: {' '.join(str(error).split())[:200]}")


class _Blobs:
    """Byte strings end to end, in memory or in a file that is mapped, of which a worker process gets no copy.

    Args:
        ends: (N,) int64, the end of each string within the content, rising.
        content: the bytes of all strings, or a file of them in the cache folder, which is held open.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def __init__(self, ends: npt.NDArray[np.int64], content: bytes | Path) -> None:
        self._ends = ends
        self._content = content
        self._mapped: npt.NDArray[np.uint8] | None = None
        if isinstance(content, Path):
            hold_open(content, self)

    def __getitem__(self, index: int) -> bytes:
        start, stop = (int(self._ends[index - 1]) if index else 0), int(self._ends[index])
        if isinstance(self._content, bytes):
            return self._content[start:stop]
        if start == stop:  # of nothing at all, no file can be mapped
            return b""
        if self._mapped is None:
            self._mapped = np.memmap(self._content, mode="r")
        return self._mapped[start:stop].tobytes()

    def __reduce__(self) -> tuple[type[_Blobs], tuple[npt.NDArray[np.int64], bytes | Path]]:
        return _Blobs, (self._ends, self._content)


def _load(tables: Sequence[ParquetTable], versions: Sequence[tuple[int, str]], progress: Progress | None) -> _Blobs:
    """The encoded images of all tables, in memory or in the cache folder."""
    if sum(table.nbytes for table in tables) <= IN_MEMORY:
        content = BytesIO()
        ends = _unpack(tables, content, progress, IN_MEMORY)
        if ends is not None:
            return _Blobs(ends, content.getvalue())
    files = digest(table.file.absolute() if isinstance(table.file, Path) else table.file for table in tables)
    stem = cache_folder() / "parquet" / f"{files}-{digest(versions)}"
    images, index, lock = (stem.with_suffix(suffix) for suffix in (".bin", ".npy", ".lock"))
    while True:
        with suppress(FileNotFoundError):  # not made yet, or removed by `trim` before it was held open
            ends = np.load(index, allow_pickle=False)
            blobs = _Blobs(ends, images)
            break
        with suppress(OSError):  # what is wrong with the folder is said when a file is written to it
            stem.parent.mkdir(parents=True, exist_ok=True)
        try:
            locked = lock_file(lock)
        except BlockingIOError:  # another process unpacks the same tables: other ranks do
            time.sleep(_LOOK_EVERY_S)
            continue
        try:
            if not (images.exists() and index.exists()):
                _unpack_to(tables, images, index, progress)
        finally:
            with suppress(OSError):
                lock.unlink()
            if locked is not None:
                locked.close()
    if images.stat().st_size != ends[-1]:
        raise DataError(f"{images} is damaged", "remove it; it is made anew")
    for other in {path.with_suffix("") for path in stem.parent.glob(f"{files}-*")} - {stem}:  # of older versions
        remove_unless_open(other.with_suffix(suffix) for suffix in (".bin", ".npy"))
    trim(cache_limit())
    return blobs


def _unpack_to(tables: Sequence[ParquetTable], images: Path, index: Path, progress: Progress | None) -> None:
    found: list[Any] = []
    replace_file(images, lambda file: found.append(_unpack(tables, file, progress)), DataError)
    replace_file(index, lambda file: np.save(file, found[0]), DataError)  # last: where it is, the other is whole


def _unpack(
    tables: Sequence[ParquetTable], file: IO[bytes], progress: Progress | None, limit: float = float("inf")
) -> npt.NDArray[np.int64] | None:
    """Writes the images of all tables one after the other.

    Returns:
        the end of each; None when they are more than `limit` bytes, whatever the tables say of themselves (a table
        holds a value that comes again only once).
    """
    total = sum(table.num_rows for table in tables)
    lengths: list[int] = []
    for table in tables:
        for images in table.images():
            file.write(b"".join(images))
            lengths += map(len, images)
            if file.tell() > limit:
                return None
            if progress is not None:
                progress("unpacking parquet", len(lengths), total)
    return np.cumsum(lengths, dtype=np.int64)


def import_pyarrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet; ConfigError where they are not installed."""
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError("parquet files need pyarrow", "pip install 'torchmae[parquet]'") from error


def _image_leaf(arrow: Any, schema: Any) -> str:
    def is_bytes(kind: Any) -> bool:
        return bool(arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind))

    for field in schema:
        children = field.type if arrow.types.is_struct(field.type) else ()
        # A table whose rows all lack their bytes gives them no type.
        if any(item.name == "bytes" and (is_bytes(item.type) or arrow.types.is_null(item.type)) for item in children):
            return f"{field.name}.bytes"
        if is_bytes(field.type):
            return str(field.name)
    raise DataError(
        f"none of the columns {', '.join(schema.names)} holds images",
        "a column of {bytes, path} is needed, as the datasets library writes for its Image feature",
    )


def _label_column(arrow: Any, schema: Any) -> tuple[str | None, str]:
    """The column of labels, if there is one; and what to say of one whose values are no labels, else ""."""
    kinds, note = arrow.types, ""
    for name in ("label", "labels", "fine_label"):
        if name in schema.names:
            kind = schema.field(name).type
            if (
                kinds.is_integer(kind)
                or kinds.is_floating(kind)
                or kinds.is_string(kind)
                or kinds.is_large_string(kind)
            ):
                return name, ""
            note = note or f"column {name} of {kind} not used: one number or name an image is needed"
    return None, note


def label_values(column: Any) -> npt.NDArray[Any]:
    """A column of an Arrow table as labels: integers, floats or texts; -1, NaN or "" where it holds nothing."""
    kind = str(column.type)
    if "int" in kind:
        return np.asarray(column.cast("int64").fill_null(-1).to_numpy())
    if "string" in kind:
        return np.array(column.fill_null("").to_pylist(), dtype=object)
    return np.asarray(column.cast("float64").to_numpy(), dtype=np.float64)


def _label_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...] | None:
    """The class names that the `datasets` library stores beside the schema."""
    try:
        stored = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        names = stored.get("info", {}).get("features", {}).get(label, {}).get("names")
    except (ValueError, AttributeError):  # a stranger's metadata: names are a nicety
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None
