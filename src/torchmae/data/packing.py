"""Packs a data set into few large files, once, so that training reads it fast: parquet, tar shards or arrays."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.lib.format import open_memmap
from PIL import Image as Pillow

from torchmae.config import PackOptions
from torchmae.data import jpeg
from torchmae.data.arrays import map_array
from torchmae.data.formats import CHANNELS, FORMATS, PACKED_ARRAY, Image, Progress, format_of, quiet_pillow
from torchmae.data.labels import in_one_list
from torchmae.data.parquet import ParquetTable, import_pyarrow
from torchmae.data.reading import BadFiles, num_cores, probe
from torchmae.data.shards import CLASSES_FILE, INDEX_SUFFIX, build_index, write_index
from torchmae.data.sources import Source
from torchmae.errors import ConfigError, DataError
from torchmae.files import lock_file, replace_file

MANIFEST = "pack.json"
"""What was packed from what, and how far it got."""

_LOCK = ".lock"
_PARTIAL = ".partial"
_CHUNK = 64  # images under way at a time
_ROWS = 100  # of a row group of parquet
_LOSSY = ("jpeg", "webp")


class Packed(NamedTuple):
    """What packing did.

    Attributes:
        images: in the packed files.
        nbytes: of the packed files.
        files: how many there are.
        resumed: images that were packed already when it began.
        bad: (name, reason) of the images left out.
    """

    images: int
    nbytes: int
    files: int
    resumed: int
    bad: list[tuple[str, str]]


def pack(splits: Mapping[str, Source], out: Path, options: PackOptions, progress: Progress | None = None) -> Packed:
    """Packs every split, in order; goes on where it was when it was stopped.

    Each file is written under another name, read back and compared, and renamed; only then does it count. Unreadable
    images are left out.

    Args:
        splits: split name to source.
        out: a folder that is new, empty, or holds the same data set half packed.
        options: how.
        progress: told how far it is.

    Raises:
        ConfigError: `out` holds something else, or the images do not fit the format.
        DataError: more unreadable images than allowed, or a file that cannot be written or read back.
    """
    splits = in_one_list(splits)
    classes = max((source.classes or () for source in splits.values()), key=len)
    if classes and options.format != "parquet":  # which holds them itself
        check_names(classes)
    is_new = not out.exists()
    manifest = _Manifest.open(out, splits, options)  # so that nothing is put into a folder that holds something else
    try:
        lock = lock_file(out / _LOCK)
    except BlockingIOError as error:
        raise ConfigError(
            f"another process is packing into {out}", "wait for it, stop it, or choose another"
        ) from error
    try:
        manifest = _Manifest.open(out, splits, options)  # as it is now that no other process adds to it
        return _pack(splits, out, options, manifest, classes, progress)
    except (ConfigError, DataError) as error:  # what does not fit the format will never do
        if not manifest.resumed and (isinstance(error, ConfigError) or not manifest.files):
            manifest.forget()
        raise
    finally:
        with suppress(OSError):  # not there
            (out / _LOCK).unlink()
        if lock is not None:
            lock.close()
        if is_new:
            with suppress(OSError):  # not empty
                out.rmdir()


def check_names(classes: Sequence[str]) -> None:
    """ConfigError for names that do not fit a file with one on each line."""
    for name in classes:
        if f"{name}.".splitlines() != [f"{name}."]:
            raise ConfigError(
                f"the class {name!r} has a line end in its name", "rename it, or choose the format parquet"
            )


def _pack(
    splits: Mapping[str, Source],
    out: Path,
    options: PackOptions,
    manifest: _Manifest,
    classes: tuple[str, ...],
    progress: Progress | None,
) -> Packed:
    total = sum(map(len, splits.values()))
    bad = BadFiles(total, options.max_bad, "max_bad")
    for name, reason in manifest.bad:
        bad.add(name, reason)
    if classes and options.format != "parquet":
        replace_file(out / CLASSES_FILE, "\n".join((*classes, "")).encode(), DataError)
    before = 0
    for split, source in splits.items():
        done = [file for file in manifest.files if file.split == split]
        if options.format == "npy":
            source = source.with_channels(probe(source).channels)
        with WRITERS[options.format](out, split, source, done, options.shard_mib * 2**20) as writer:
            writer.check_done()
            for record in _records(source, writer.next, options):
                if record.failure is not None:
                    bad.add(record.name, record.failure)
                    manifest.bad.append((record.name, record.failure))
                finished = writer.add(record)
                if finished is not None:
                    manifest.add(finished)
                if progress is not None:
                    progress("packing", before + record.index + 1, total)
            for finished in writer.finish():
                manifest.add(finished)
            writer.settle()
        before += len(source)
    for left_over in out.glob("*.partial"):  # by a process that was killed
        left_over.unlink()
    if not sum(file.images for file in manifest.files):
        manifest.forget()
        first = f", the first: {': '.join(bad.items[0])}" if bad.items else ""
        raise DataError(f"none of {total:,} images can be read, so there is nothing to pack{first}", "check the data")
    manifest.close()
    return Packed(
        sum(file.images for file in manifest.files),
        sum(file.stat().st_size for file in out.iterdir() if file.name not in (MANIFEST, _LOCK)),
        len({file.name for file in manifest.files}),
        manifest.resumed,
        bad.items,
    )


class _Manifest:
    """The file that says what is packed, from what, and how far."""

    def __init__(self, path: Path, task: dict[str, Any], state: dict[str, Any]) -> None:
        self._path = path
        self._task = task
        self.files = [PackedFile(**file) for file in state.get("files", [])]
        self.resumed = sum(file.images for file in self.files)
        self.bad: list[tuple[str, str]] = [(name, reason) for name, reason in state.get("bad", [])]

    @classmethod
    def open(cls, out: Path, splits: Mapping[str, Source], options: PackOptions) -> _Manifest:
        """The manifest of a folder, new or of the same task; ConfigError where the folder holds something else."""
        how = {name: value for name, value in asdict(options).items() if name not in ("max_bad", "root", "progress")}
        task = {
            "options": how,
            "data": {split: [source.fingerprint(), source.stamp()] for split, source in splits.items()},
            "labels": {split: source.label_fingerprint() for split, source in splits.items()},
        }
        path = out / MANIFEST
        if path.is_file():
            try:
                state = json.loads(path.read_text(encoding="utf-8"))
                if state["task"] == task:
                    return cls(path, task, state)
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path} is damaged", "remove the folder, or choose another") from error
            raise ConfigError(
                f"{out} was packed from other data, or otherwise", "choose another folder, or remove this one"
            )
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} exists and is not an empty folder", "choose another")
        manifest = cls(path, task, {})
        manifest._save(complete=False)
        return manifest

    def add(self, file: PackedFile) -> None:
        """Notes that a file (or a part of one) is whole."""
        self.files.append(file)
        self._save(complete=False)

    def forget(self) -> None:
        """Removes the manifest and all that it notes, and what is not whole."""
        folder = self._path.parent
        names = {MANIFEST, CLASSES_FILE, *(file.name for file in self.files)}
        paths = [folder / name for name in names] + [folder / f"{name}{INDEX_SUFFIX}" for name in names]
        for path in [*paths, *folder.glob("*.partial")]:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Notes that all is done."""
        self._save(complete=True)

    def _save(self, *, complete: bool) -> None:
        state = {
            "task": self._task,
            "complete": complete,
            "files": [file._asdict() for file in self.files],
            "bad": sorted(set(self.bad)),
        }
        replace_file(self._path, json.dumps(state, indent=1).encode(), DataError)


def _records(source: Source, start: int, options: PackOptions) -> Iterator[Record]:
    """The images from `start` on, ready to be written, in order."""

    def prepare(index: int) -> Record:
        label = -1 if source.labels is None else int(source.labels[index])
        name = source.name(index)
        try:
            content = _prepare(source, index, options)
        except DataError as error:
            return Record(index, name, label, None, error.problem)
        return Record(index, name, label, content, None)

    with ThreadPoolExecutor(num_cores()) as pool:
        for first in range(start, len(source), _CHUNK):
            with quiet_pillow():
                records = list(pool.map(prepare, range(first, min(first + _CHUNK, len(source)))))
            yield from records


def _prepare(source: Source, index: int, options: PackOptions) -> bytes | Image:
    """What is written of one image: its values, or a file, which is the source's own where it need not change."""
    image = source.open(index).read()  # so that what is packed can be read
    whole = options.max_size is None or max(image.shape[:-1]) <= options.max_size
    changed = image if whole else reduce(image, options.max_size or 0)
    if options.format == "npy":
        return changed
    raw = source.encoded(index)
    form = None if raw is None else format_of(raw)
    if raw is not None and form is not None and whole and _is_plain(raw, options):
        return raw
    lossy = form is not None and any(form is FORMATS[name] for name in _LOSSY)
    return encode(changed, options.quality if lossy and not whole else None)


def _is_plain(raw: bytes, options: PackOptions) -> bool:
    """Whether a file reads the same without the options that it was read with."""
    odd = options.nodata is not None or options.pages != "first" or options.axes is not None
    return not odd and (options.truncated == "skip" or not raw.startswith(b"\xff\xd8") or jpeg.is_whole(raw))


def reduce(image: Image, max_size: int) -> Image:
    """Resamples an image so that its longer side has `max_size` pixels: antialiased bicubic, as Pillow does it.

    Args:
        image: (H, W, C) uint8, uint16 or float32.
        max_size: pixels.

    Raises:
        ConfigError: not two spatial dimensions.
    """
    if image.ndim != 3:
        raise ConfigError(f"images with {image.ndim - 1} dimensions cannot be reduced", "leave max_size out")
    factor = max_size / max(image.shape[:2])
    height, width = (max(1, round(length * factor)) for length in image.shape[:2])
    if image.dtype == np.uint8 and image.shape[2] in (1, 3):
        pixels = Pillow.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        resized = np.asarray(pixels.resize((width, height), Pillow.Resampling.BICUBIC))
        return resized.reshape(height, width, -1)
    planes = [Pillow.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(image, -1, 0)]
    stacked = np.stack([np.asarray(plane.resize((width, height), Pillow.Resampling.BICUBIC)) for plane in planes], -1)
    if image.dtype.kind == "f":
        return stacked
    return np.clip(np.rint(stacked), 0, np.iinfo(image.dtype).max).astype(image.dtype)


def encode(image: Image, quality: int | None) -> bytes:
    """An image as a file: JPEG of some quality, else lossless: PNG, or an array of its own where no picture holds it.

    Args:
        image: (*size, C).
        quality: 1 to 100; None: lossless. Of no effect on what is not 8 bits, grey or RGB.
    """
    buffer = io.BytesIO()
    channels = (1, 3) if image.dtype == np.uint8 else (1,) if image.dtype == np.uint16 else ()
    if image.ndim != 3 or image.shape[2] not in channels:
        np.save(buffer, image.view([(CHANNELS, image.dtype, image.shape[-1:])])[..., 0])
        return buffer.getvalue()
    picture = Pillow.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    if quality is None or image.dtype != np.uint8:
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


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
        raw = record.content if isinstance(record.content, bytes) else plain_order(record.content).data.cast("B")
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
        with self.partial.open("rb") as file:
            os.fsync(file.fileno())
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
        key, form = f"{record.index:09d}", format_of(record.content)
        assert form is not None
        suffix = PACKED_ARRAY if form is FORMATS["npy"] else form.suffixes[0]
        self._member(f"{key}{suffix}", record.content)
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
        self._array: Any = None

    def write(self, record: Record) -> None:
        """As in `Writer`."""
        assert isinstance(record.content, np.ndarray)
        image = plain_order(record.content)
        if self._array is None:
            self._first = record
            self._array = self._open(image)
        first = self._array[0]
        if image.shape != first.shape or image.dtype != first.dtype:
            described = [f"{'x'.join(map(str, item.shape))} {item.dtype}" for item in (first, image)]
            raise ConfigError(
                f"one array cannot hold them: {described[0]} before, {record.name} is {described[1]}",
                "choose the format parquet or wds",
            )
        self._array[self._rows + len(self._new_labels)] = image
        self._new_labels.append(record.label)

    def _open(self, image: Image) -> Any:
        """The array, mapped, with room for every image of the source; new, or with the rows that are whole."""
        if self._rows:
            array = open_memmap(self.partial, mode="r+") if self.partial.exists() else None
            if array is None or array.shape != (len(self.source), *array.shape[1:]):
                raise DataError(f"{self.partial} has lost rows", "remove the folder, and pack again")
            return array
        array = open_memmap(self.partial, mode="w+", dtype=image.dtype, shape=(len(self.source), *image.shape))
        if hasattr(os, "posix_fallocate"):  # else a disk that fills up would end the process in the middle of a row
            with self.partial.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, self.partial.stat().st_size)
        return array

    def seal(self) -> tuple[str, str, list[int] | None]:
        """As in `Writer`."""
        self._array.flush()
        found = Digest()
        for row, label in enumerate(self._new_labels, self._rows):
            found.add(np.ascontiguousarray(self._array[row]).data.cast("B"), label)
        return self.path.name, found.value(), self._new_labels

    def commit(self) -> int:
        """As in `Writer`."""
        self._rows += len(self._new_labels)
        self._labels += self._new_labels
        self._new_labels = []
        return self.partial.stat().st_size

    def check_done(self) -> None:
        """As in `Writer`."""
        if self.done and not self.partial.exists():  # whose rows are counted where more are added
            self._check_size(self.path, None)
            if self.source.labels is not None:
                self._check_size(self._labels_path, None)
            if len(map_array(self.path)) != self._rows:
                raise DataError(f"{self.path} has lost rows", "remove the folder, and pack again")

    def settle(self) -> None:
        """Takes the room of unreadable images off, and gives the file its name."""
        self.abandon()
        if not self.partial.exists():  # all was done already
            return
        array = open_memmap(self.partial, mode="r+")
        shape, dtype, start = (self._rows, *array.shape[1:]), array.dtype, array.offset
        del array
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        with self.partial.open("r+b") as file:
            np.lib.format.write_array_header_1_0(file, header)
            assert file.tell() == start  # NumPy leaves room for any number of rows
            file.truncate(start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
            os.fsync(file.fileno())
        if self.source.labels is not None:
            labels = np.array(self._labels, dtype=np.int64)
            replace_file(self._labels_path, lambda file: np.save(file, labels), DataError)
        self.partial.replace(self.path)

    def abandon(self) -> None:
        """Closes what is open; the rows that are whole stay."""
        self._array = None


def plain_order(image: Image) -> Image:
    """Contiguous and little-endian, as it is stored."""
    return np.ascontiguousarray(image, dtype=image.dtype.newbyteorder("<"))


WRITERS: dict[str, type[Writer]] = {"parquet": ParquetWriter, "wds": ShardWriter, "npy": ArrayWriter}
"""The formats."""
