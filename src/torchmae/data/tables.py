"""Encoded images in tables: parquet files, and data sets of the Hugging Face `datasets` library."""

from __future__ import annotations

import json
import os
import re
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from torchmae.data.folders import SPLIT_NAMES
from torchmae.data.items import Context, Progress, tracked
from torchmae.data.remote import Place, cache_folder, cache_limit, last_name, open_place, place_version, shown, trim
from torchmae.data.sources import EncodedSource, FileSource, Source, Strings, digest
from torchmae.errors import DataError, reason_of, require
from torchmae.files import hold_open, locked, remove_unless_open, replace_file

HUB_PREFIX = "hf:"  # as in hf:user/name, hf:user/name:configuration, hf:./folder
IN_MEMORY = 256 * 2**20  # largest size in bytes of encoded images that each worker process keeps in memory
_ROWS = 256  # read at a time
_LOOK_EVERY_S = 0.2  # while another process unpacks the table
_LABELS = ("label", "labels", "fine_label")
_LABEL_TYPES = re.compile(r"u?int\d+|halffloat|float|double|(large_)?string")


class ParquetSource(EncodedSource):
    """Encoded images in parquet files (or their URLs), in the order of the files and of the rows in them.

    All files have the same columns: one with images (a struct with `bytes`, or binary), and perhaps one with labels,
    named label, labels or fine_label. Paths in a table are never opened. Up to `IN_MEMORY` bytes are kept in memory;
    larger tables are unpacked once into the cache folder. DataError: no parquet file, or no column of images.
    """

    def __init__(self, files: Sequence[Place], context: Context = Context()) -> None:
        self._names = [last_name(file) for file in files]
        tables = [ParquetTable(file) for file in files]
        self._versions = [place_version(file) for file in files]
        self._starts = np.cumsum([0] + [table.num_rows for table in tables])  # first row of each file
        first = tables[0]
        for name, table in zip(self._names, tables, strict=True):
            if (table.leaf, table.label) != (first.leaf, first.label):
                raise DataError(f"{name} has other columns than {self._names[0]}", "give files of one data set")
        labels = None if first.label is None else np.concatenate([table.labels() for table in tables])
        self.remarks = (first.note,) if first.note else ()
        super().__init__(int(self._starts[-1]), labels, first.classes, context)
        if not len(self):
            raise DataError(f"{self._names[0]} holds no rows", "give a table of images")
        self._encoded = _load(tables, self._versions, context.progress)

    def encoded(self, index: int) -> bytes:
        raw = self._encoded[index]
        if not raw:
            raise DataError("the table holds no bytes for it")
        return raw

    def name(self, index: int) -> str:
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self._names[file]}/{index - self._starts[file]}"

    def fingerprint(self) -> str:
        """A digest of the names and sizes of the files."""
        return digest([list(zip(self._names, [size for size, _ in self._versions], strict=True)), len(self)])

    def stamp(self) -> str:
        return digest(self._versions)


class ParquetTable:
    """One parquet file, which is read in order."""

    def __init__(self, file: Place) -> None:
        self.file = file
        with self._opened() as table:
            schema, facts = table.schema_arrow, table.metadata
        self.leaf = _image_leaf(schema)  # parquet's name of the column of bytes: "image.bytes"
        self.label, self.note = label_column(schema)
        self.classes = _class_names(schema.metadata, self.label)
        self.num_rows: int = facts.num_rows
        column = next(i for i in range(facts.num_columns) if facts.schema.column(i).path == self.leaf)
        groups = [facts.row_group(i).column(column) for i in range(facts.num_row_groups)]
        self.nbytes = sum(group.total_uncompressed_size for group in groups)  # too small if values are repeated

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        arrow, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
        try:
            with open_place(self.file) as file, parquet.ParquetFile(file) as table:
                yield table
        except (OSError, arrow.ArrowException) as error:
            raise DataError(f"cannot read {shown(str(self.file))}: {reason_of(error)}") from error

    def labels(self) -> npt.NDArray[Any]:
        """(N,), as from `label_values`."""
        with self._opened() as table:
            return label_values(table.read(columns=[self.label]).column(0))

    def images(self) -> Iterator[bytes]:
        """The encoded images; b"" for a row without one."""
        with self._opened() as table:
            for batch in table.iter_batches(_ROWS, columns=[self.leaf]):
                column = batch.column(0)
                values = column.field("bytes") if column.type.num_fields else column
                yield from (value or b"" for value in values.to_pylist())


class _Mapped(Strings):
    """The images of a memory-mapped cache file, which `trim` does not remove while this object exists."""

    def __init__(self, path: Path, ends: npt.NDArray[np.int64]) -> None:
        super().__init__()
        hold_open(path, self)
        if path.stat().st_size != ends[-1]:
            raise DataError(f"{path} is damaged", "remove it; it is made again")
        self._content = np.memmap(path, mode="r") if ends[-1] else b""  # an empty file cannot be mapped
        self._ends = array("q", ends.tobytes())
        self._path = path

    def __reduce__(self) -> tuple[type[_Mapped], tuple[Path, npt.NDArray[np.int64]]]:
        return _Mapped, (self._path, self.parts[1])


def _load(tables: Sequence[ParquetTable], versions: Sequence[tuple[int, str]], progress: Progress | None) -> Strings:
    """The encoded images of all tables, in memory or in the cache folder."""
    if sum(table.nbytes for table in tables) <= IN_MEMORY:
        content = BytesIO()
        ends = _unpack(tables, content, progress, IN_MEMORY)
        if ends is not None:
            return Strings.of(content.getvalue(), ends)
    files = digest(table.file.absolute() if isinstance(table.file, Path) else table.file for table in tables)
    stem = cache_folder() / "parquet" / f"{files}-{digest(versions)}"
    images, index = stem.with_suffix(".bin"), stem.with_suffix(".npy")
    found: list[Any] = []
    while True:
        with suppress(FileNotFoundError):  # not made yet, or removed by `trim` before it was opened here
            ends = np.load(index, allow_pickle=False)
            mapped = _Mapped(images, ends)
            break
        with suppress(OSError):  # writing a file into the folder reports the problem
            stem.parent.mkdir(parents=True, exist_ok=True)
        try:
            with locked(stem.with_suffix(".lock")):
                if not (images.exists() and index.exists()):
                    replace_file(images, lambda file: found.append(_unpack(tables, file, progress)), DataError)
                    # The index comes last: if it exists, the images are complete.
                    replace_file(index, lambda file: np.save(file, found[-1]), DataError)
        except BlockingIOError:  # another process or rank unpacks the same tables
            time.sleep(_LOOK_EVERY_S)
    for other in {path.with_suffix("") for path in stem.parent.glob(f"{files}-*")} - {stem}:  # older versions
        remove_unless_open(other.with_suffix(suffix) for suffix in (".bin", ".npy"))
    trim(cache_limit())
    return mapped


def _unpack(
    tables: Sequence[ParquetTable], file: IO[bytes], progress: Progress | None, limit: float = float("inf")
) -> npt.NDArray[np.int64] | None:
    """Writes the images of all tables one after the other and returns their ends; None: more than `limit` bytes."""
    total = sum(table.num_rows for table in tables)
    lengths: list[int] = []
    for image in tracked(chain.from_iterable(table.images() for table in tables), progress, "unpacking parquet", total):
        lengths.append(file.write(image))
        if file.tell() > limit:
            return None
    return np.cumsum(lengths, dtype=np.int64)


def _image_leaf(schema: Any) -> str:
    """The first column of bytes, or of structs with `bytes`; DataError: there is none."""
    binary = ("binary", "large_binary")
    for field in schema:
        children = {item.name: str(item.type) for item in field.type} if str(field.type).startswith("struct") else {}
        if children.get("bytes") in (*binary, "null"):  # null: all rows are empty
            return f"{field.name}.bytes"
        if str(field.type) in binary:
            return str(field.name)
    fix = "a column of {bytes, path} is needed, as the datasets library writes for its Image feature"
    raise DataError(f"none of the columns {', '.join(schema.names)} holds images", fix)


def label_column(schema: Any) -> tuple[str | None, str]:
    """The column of labels of an Arrow schema, or None; and a note if a column's values are no labels, else ""."""
    kinds = {name: str(schema.field(name).type) for name in _LABELS if name in schema.names}
    for name, kind in kinds.items():
        if _LABEL_TYPES.fullmatch(kind):
            return name, ""
    notes = [f"column {name} of {kind} not used: one number or name an image is needed" for name, kind in kinds.items()]
    return None, notes[0] if notes else ""


def label_values(column: Any) -> npt.NDArray[Any]:
    """A column of an Arrow table as labels: integers, floats or texts; missing values are -1, NaN or ""."""
    kind = str(column.type)
    if "int" in kind:
        return np.asarray(column.cast("int64").fill_null(-1).to_numpy())
    if "string" in kind:
        return np.array(column.fill_null("").to_pylist(), dtype=object)
    return np.asarray(column.cast("float64").to_numpy(), dtype=np.float64)


def _class_names(metadata: dict[bytes, bytes] | None, label: str | None) -> tuple[str, ...] | None:
    """The names of classes that the `datasets` library stores with the schema."""
    with suppress(ValueError, AttributeError):  # unexpected metadata: go on without names
        stored = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        names = stored.get("info", {}).get("features", {}).get(label, {}).get("names")
        return tuple(map(str, names)) if isinstance(names, list) else None
    return None


def _absolute(path: str | Path) -> Path:
    """The absolute path without ".."; unlike resolve(), links are not followed."""
    return Path(os.path.abspath(path))  # noqa: PTH100


class HubSource(EncodedSource):
    """The images of one split (a `datasets.Dataset`), memory-mapped from the library's own cache.

    Files that the table names are read (links are followed) only if they are in its own folder or in `folders`.
    DataError: no column of images.
    """

    def __init__(self, rows: Any, title: str, folders: Iterable[Path], context: Context) -> None:
        library = require("datasets", "datasets")
        images = [name for name, feature in rows.features.items() if isinstance(feature, library.Image)]
        if not images:
            raise DataError(f"none of the columns {', '.join(rows.features)} of {title} holds images")
        self._image, self._title = images[0], title
        label, note = label_column(rows.features.arrow_schema)
        labels = names = None
        if label is not None:
            labels, names = label_values(rows.data.column(label)), getattr(rows.features[label], "names", None)
            if (indices := getattr(rows, "_indices", None)) is not None:
                labels = labels[indices.column(0).to_numpy()]
        self.remarks = (note,) if note else ()
        super().__init__(len(rows), labels, names, context)
        self._rows = rows.select_columns([self._image]).cast_column(self._image, library.Image(decode=False))
        tables = [Path(file["filename"]).parent for file in rows.cache_files[:1]]
        self._folders = {place for path in (*folders, *tables) for place in (_absolute(path), path.resolve())}

    def encoded(self, index: int) -> bytes:
        """The bytes in the table, or of the file that it names."""
        cell: dict[str, Any] = self._rows[index][self._image] or {}
        if cell.get("bytes"):
            return bytes(cell["bytes"])
        if not cell.get("path"):
            raise DataError("the table holds no bytes for it")
        path = _absolute(cell["path"])
        if not any(path.is_relative_to(folder) for folder in self._folders):
            raise DataError(f"the table names {path}, which lies outside of its folder")
        return FileSource(path.parent, [path.name]).encoded(0)

    def name(self, index: int) -> str:
        return f"{self._title}/{index}"

    def fingerprint(self) -> str:
        """A digest of the length, the version and 64 rows; the library's own changes from load to load."""
        cells = [self._rows[int(i)][self._image] or {} for i in np.linspace(0, len(self) - 1, 64).astype(int)]
        sample = [cell.get("bytes") or Path(cell.get("path") or "").name for cell in cells]
        return digest([self._title, self._rows.info.version, len(self), *sample])


def hub_splits(spec: str, context: Context = Context()) -> dict[str, Source]:
    """The splits of a data set that the `datasets` library loads, and downloads if needed.

    `spec` is the source without `HUB_PREFIX`. Splits with other names than train, val and test are left out; if there
    is no train split, the first one is used. ConfigError: the library is not installed. DataError: the data set cannot
    be loaded, or has no column of images.
    """
    library = require("datasets", "datasets")
    name, _, configuration = spec.partition(":")
    local = Path(name).expanduser()
    try:
        loaded = library.load_dataset(str(local) if local.is_dir() else name, configuration or None)
    except Exception as error:  # network, parsers, builders: each has errors of its own
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        problem = f"{HUB_PREFIX}{spec} cannot be loaded: {reason_of(cause)}"
        raise DataError(problem, "check the name, the network and HF_HOME") from error
    groups = {SPLIT_NAMES[key.lower()]: rows for key, rows in loaded.items() if key.lower() in SPLIT_NAMES}
    if "train" not in groups:
        groups["train"] = next(iter(loaded.values()))
    cache = require("huggingface_hub.constants", "datasets").HF_HUB_CACHE
    folders = [Path(library.config.DOWNLOADED_DATASETS_PATH), Path(cache) / f"datasets--{name.replace('/', '--')}"]
    if local.is_dir():
        folders.append(local)
    return {split: HubSource(rows, f"{name}/{split}", folders, context) for split, rows in groups.items()}
