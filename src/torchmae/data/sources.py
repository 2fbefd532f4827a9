"""What images come from: arrays, files and parquet tables behind one small protocol."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from torchmae.data.decode import check_channels, decode
from torchmae.errors import ConfigError, DataError

Image = npt.NDArray[Any]
Labels = npt.NDArray[np.int64]


class Source(Protocol):
    """Images in a fixed order, with labels where there are any.

    Attributes:
        labels: (N,), -1 where unknown; None where nothing has a label.
        classes: the name of each label, where known.
    """

    labels: Labels | None
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        """How many images there are."""

    def read(self, index: int) -> Image:
        """(*size, C) uint8, uint16 or float32, an array of the caller's own; DataError, naming it, if unreadable."""

    def name(self, index: int) -> str:
        """Where an image is from, for messages: a path, or "digits/17"."""

    def fingerprint(self) -> str:
        """A hexadecimal digest that changes when images are added, removed, renamed or replaced."""

    def with_channels(self, channels: int) -> Source:
        """The same images read with so many channels; ConfigError where that cannot be."""


def digest(parts: Iterable[object]) -> str:
    """32 hexadecimal digits of the texts (or bytes) of `parts`, the same on every machine."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part if isinstance(part, bytes) else str(part).encode("utf-8", "backslashreplace"))
        state.update(b"\0")
    return state.hexdigest()


def spread(length: int, count: int) -> npt.NDArray[np.int64]:
    """At most `count` different indices below `length`, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))


class ArraySource:
    """Images in one array.

    Args:
        images: (N, *size, C) or, without a channel axis, (N, *size); bool, uint8, uint16 or floats.
        labels: (N,) integers, -1 where unknown.
        classes: the name of each label.
        title: what to call the images in messages.
        spatial_dims: how many axes are spatial, 1 to 3; None: (N, L), (N, H, W), (N, H, W, C), (N, D, H, W, C).
        file: a .npy file that `images` is mapped from: worker processes map it again instead of copying it.

    Raises:
        DataError: an array that is no set of images, with the way to make it one.
        ConfigError: its shape does not have `spatial_dims` spatial axes.
    """

    def __init__(
        self,
        images: Image,
        labels: npt.ArrayLike | None = None,
        classes: Sequence[str] | None = None,
        *,
        title: str = "array",
        spatial_dims: int | None = None,
        file: Path | None = None,
    ) -> None:
        if images.dtype.kind not in "bf" and images.dtype not in (np.uint8, np.uint16):
            raise DataError(
                f"{title} holds {images.dtype}", "save uint8 (0 to 255), uint16 (0 to 65535) or floats (0 to 1)"
            )
        dims = _spatial_dims(images.shape, spatial_dims, title)
        self.images = images if images.ndim == dims + 2 else images[..., None]
        self.labels = None if labels is None else _checked_labels(labels, len(images), title)
        self.classes = None if classes is None else tuple(classes)
        self._title = title
        self._file = file

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Image:
        """(*size, C): bool becomes uint8 0 and 255, any float float32."""
        image = self.images[index]
        if image.dtype == np.bool_:
            return image.astype(np.uint8) * np.uint8(255)
        return image.astype(np.float32 if image.dtype.kind == "f" else image.dtype)  # a copy in either case

    def name(self, index: int) -> str:
        """The title and the index."""
        return f"{self._title}/{index}"

    def fingerprint(self) -> str:
        """Of shape, type and the content of 64 images."""
        sample = self.images[spread(len(self), 64)]
        return digest([self.images.shape, self.images.dtype, np.ascontiguousarray(sample).tobytes()])

    def with_channels(self, channels: int) -> ArraySource:
        """The source itself; ConfigError where `channels` is not what the array has."""
        have = self.images.shape[-1]
        if channels != have:
            raise ConfigError(
                f"{self._title} has {have} channels and the model takes {channels}",
                f"set model.in_chans to {have}, or leave it out",
            )
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self._file is not None:
            state["images"] = self.images.shape
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._file is not None:
            self.images = map_array(self._file).reshape(state["images"])


def map_array(path: Path) -> Image:
    """Maps a .npy file into memory; nothing is read before it is used, and writing does not reach the file."""
    try:
        array: Image = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"cannot read {path}: {' '.join(str(error).split())}", "save one numeric array with numpy.save"
        ) from error
    return array


def _spatial_dims(shape: tuple[int, ...], given: int | None, title: str) -> int:
    """How many axes of an array of images are spatial; DataError when it does not look like one."""
    dims = given if given is not None else {2: 1, 3: 2, 4: 2, 5: 3}.get(len(shape), 0)
    if dims == 0 or len(shape) not in (dims + 1, dims + 2):
        form = "it should be (images, *size) or (images, *size, channels)"
        if given is None:
            raise DataError(f"{title} has shape {shape}", f"{form} with 1 to 3 numbers in size")
        raise ConfigError(
            f"{title} has shape {shape}, which does not fit the {given} numbers of model.input_size",
            f"{form} with as many numbers in size as model.input_size has",
        )
    if 0 in shape:
        raise DataError(f"{title} has shape {shape}: it is empty", "save at least one image")
    if len(shape) == dims + 2 and shape[1] <= 16 < shape[-1] and shape[1] < shape[2]:
        raise DataError(
            f"{title} has shape {shape}, which looks like channels first", "save numpy.moveaxis(images, 1, -1) instead"
        )
    return dims


def _checked_labels(labels: npt.ArrayLike, count: int, title: str) -> Labels:
    array = np.asarray(labels)
    if array.shape == (count, 1):
        array = array[:, 0]
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise DataError(
            f"the labels of {title} have shape {array.shape} and type {array.dtype}",
            f"they should be {count} integers, one an image, -1 where unknown",
        )
    return array.astype(np.int64)


class FileSource:
    """Image files, decoded when they are read.

    Args:
        root: the folder that `names` are relative to.
        names: paths of the files.
        labels: (N,) integers, -1 where unknown.
        classes: the name of each label.
        channels: 1 or 3; None: what each file has.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        labels: npt.ArrayLike | None = None,
        classes: Sequence[str] | None = None,
        channels: int | None = None,
    ) -> None:
        self._root = root
        # One block of bytes: a list of a million strings would be copied into every worker process, string by
        # string, as the reference counts that live beside them change.
        self._names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self._channels = channels
        self.labels = None if labels is None else _checked_labels(labels, len(names), str(root))
        self.classes = None if classes is None else tuple(classes)

    def __len__(self) -> int:
        return len(self._names)

    def _path(self, index: int) -> Path:
        return self._root / os.fsdecode(bytes(self._names[index]))

    def read(self, index: int) -> Image:
        """(H, W, C), as `decode` gives it."""
        return decode(self._path(index), self._channels)

    def name(self, index: int) -> str:
        """The path of the file."""
        return str(self._path(index)).encode("utf-8", "backslashreplace").decode("utf-8")

    def fingerprint(self) -> str:
        """Of the names and sizes of the files."""
        return digest(part for i in range(len(self)) for part in (bytes(self._names[i]), _file_size(self._path(i))))

    def with_channels(self, channels: int) -> FileSource:
        """The same files, all decoded to 1 or 3 channels."""
        same = copy.copy(self)
        same._channels = check_channels(channels)
        return same


class ParquetSource:
    """Encoded images in the tables of the Hugging Face `datasets` library, kept in memory as they are.

    Args:
        files: parquet files with one and the same schema: a column of images (a struct with `bytes`, or plain
            binary), and integers called label, labels or fine_label.
        channels: 1 or 3; None: what each image has.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: a file that is not parquet, or has no column of images.
    """

    def __init__(self, files: Sequence[Path], channels: int | None = None) -> None:
        arrow, compute, parquet = _import_pyarrow()
        self._files = [(file.name, _file_size(file)) for file in files]
        self._channels = channels
        try:
            schema = parquet.read_schema(files[0])
            image, label = _image_column(arrow, schema), _label_column(arrow, schema)
            columns = [image, label] if label else [image]
            tables = [parquet.read_table(file, columns=columns) for file in files]
            table = arrow.concat_tables(tables)
        except (OSError, arrow.ArrowException) as error:
            raise DataError(f"cannot read {files[0]}: {' '.join(str(error).split())[:200]}") from error
        column = table.column(image)
        self._starts = np.cumsum([0] + [part.num_rows for part in tables])  # first row of each file
        self._encoded = compute.struct_field(column, "bytes") if arrow.types.is_struct(column.type) else column
        self.labels = None if label is None else table.column(label).cast("int64").fill_null(-1).to_numpy()
        self.classes = None if label is None else _label_names(schema.metadata, label)

    def __len__(self) -> int:
        return len(self._encoded)

    def read(self, index: int) -> Image:
        """(H, W, C), as `decode` gives it."""
        raw = self._encoded[index].as_py()
        if raw is None:
            raise DataError(f"{self.name(index)}: the table holds no bytes for it")
        try:
            return decode(raw, self._channels)
        except DataError as error:
            raise DataError(f"{self.name(index)}: {error}") from None

    def name(self, index: int) -> str:
        """The file and the row in it."""
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self._files[file][0]}/{index - self._starts[file]}"

    def fingerprint(self) -> str:
        """Of the names and sizes of the files."""
        return digest([self._files, len(self)])

    def with_channels(self, channels: int) -> ParquetSource:
        """The same images, all decoded to 1 or 3 channels."""
        same = copy.copy(self)
        same._channels = check_channels(channels)
        return same


def _import_pyarrow() -> tuple[Any, Any, Any]:
    try:
        arrow = importlib.import_module("pyarrow")
        return arrow, importlib.import_module("pyarrow.compute"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError("parquet files need pyarrow", "pip install pyarrow") from error


def _image_column(arrow: Any, schema: Any) -> str:
    for field in schema:
        struct = arrow.types.is_struct(field.type) and "bytes" in [child.name for child in field.type]
        if struct or arrow.types.is_binary(field.type) or arrow.types.is_large_binary(field.type):
            return str(field.name)
    raise DataError(
        f"none of the columns {', '.join(schema.names)} holds images",
        "a column of {bytes, path} is needed, as the datasets library writes for its Image feature",
    )


def _label_column(arrow: Any, schema: Any) -> str | None:
    for name in ("label", "labels", "fine_label"):
        if name in schema.names and arrow.types.is_integer(schema.field(name).type):
            return name
    return None


def _label_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...] | None:
    """The class names that the `datasets` library stores beside the schema."""
    stored = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    names = stored.get("info", {}).get("features", {}).get(label, {}).get("names")
    return None if names is None else tuple(names)


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


class Subset:
    """Some of a source's images.

    Args:
        source: the images.
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

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Image:
        """The source's."""
        return self.source.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        """The source's."""
        return self.source.name(int(self.indices[index]))

    def fingerprint(self) -> str:
        """Of the source's and the indices."""
        return digest([self.source.fingerprint(), self.indices.tobytes()])

    def with_channels(self, channels: int) -> Subset:
        """The same subset of the source with `channels`."""
        same = copy.copy(self)
        same.source = self.source.with_channels(channels)
        return same


def relabel(source: Source, classes: tuple[str, ...]) -> Source:
    """The same images with labels that count in `classes`; -1 for a class that is not among them.

    Without names, labels keep their numbers.
    """
    if source.labels is None or source.classes is None or source.classes == classes:
        return source
    numbers = np.array([classes.index(name) if name in classes else -1 for name in source.classes] + [-1])
    return Subset(source, np.arange(len(source)), numbers[source.labels].astype(np.int64), classes)
