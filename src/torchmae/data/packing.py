"""Packs a data set into a few large files that training reads fast: parquet, tar shards or arrays."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from PIL import Image as Pillow

from torchmae.config import PackOptions
from torchmae.data import jpeg
from torchmae.data.arrays import map_array
from torchmae.data.formats import CHANNELS, FORMATS, PACKED_ARRAY, format_of
from torchmae.data.items import Image, Progress, tracked
from torchmae.data.reading import BadFiles, map_samples, probe
from torchmae.data.shards import CLASSES_FILE, INDEX_SUFFIX, build_index, write_index
from torchmae.data.sources import Source, in_one_list
from torchmae.data.tables import ParquetTable
from torchmae.errors import ConfigError, DataError, reason_of, require
from torchmae.files import locked, replace_file

_MANIFEST = "pack.json"
_LOCK = ".lock"
_PARTIAL = ".partial"
_PACK_AGAIN = "remove the folder, and pack again"
_ROWS = 100  # in a row group of parquet


class Packed(NamedTuple):
    """What a pack holds."""

    images: int
    nbytes: int
    files: int
    resumed: int  # images that an earlier, interrupted call had packed
    bad: list[tuple[str, str]]  # name and reason of each image left out


class Part(NamedTuple):
    """A finished and verified file, or some rows of an array file."""

    split: str
    name: str  # of the file
    stop: int  # index in the source after the part's last image
    images: int
    digest: str  # of the images' bytes and labels
    labels: list[int] | None = None  # of an array's rows, because the file of labels is written last
    nbytes: int | None = None  # of the file; None: packed by a version that did not note it


@dataclass(frozen=True)
class Record:
    """One image to write."""

    index: int  # in its source
    name: str
    label: int  # -1: unknown
    content: bytes | Image  # an encoded file; for the format npy, pixel values


def pack(splits: Mapping[str, Source], out: Path, options: PackOptions, progress: Progress | None = None) -> Packed:
    """Packs every split, in order, into a folder that is new, empty, or left by an interrupted call for the same data.

    Each file is written under a temporary name, read back, compared and renamed. ConfigError: `out` holds something
    else, or the images do not fit the format. DataError: too many unreadable images, or a file that cannot be written.
    """
    if options.group is not None:
        raise ConfigError(
            f"data.group is {options.group!r}, and packed data holds no groups",
            "pack training and held-out images as splits of their own, which train and val folders are",
        )
    splits = in_one_list(splits)
    how = {name: value for name, value in asdict(options).items() if name not in ("max_bad", "root", "progress")}
    task = {
        "options": how,
        "data": {split: [source.fingerprint(), source.stamp()] for split, source in splits.items()},
        "labels": {split: source.label_fingerprint() for split, source in splits.items()},
    }
    is_new, bad = not out.exists(), BadFiles(sum(map(len, splits.values())), options.max_bad, "max_bad")
    _Manifest.load(out, task, bad)  # before the lock, which would write into a folder with something else
    try:
        with locked(out / _LOCK):
            manifest = _Manifest.load(out, task, bad)  # again, since another process may have added to it
            return _pack(splits, options, manifest, progress)
    except BlockingIOError as error:
        raise ConfigError(f"another process is packing into {out}", "wait for it, or choose another") from error
    finally:
        if is_new:
            with suppress(OSError):  # not empty
                out.rmdir()


def _pack(splits: Mapping[str, Source], options: PackOptions, manifest: _Manifest, progress: Progress | None) -> Packed:
    out, bad, resumed, before = manifest.out, manifest.bad, manifest.images, 0
    try:
        if options.format != "parquet":  # parquet files hold the names of classes
            _write_classes(out, splits)
        for split, source in splits.items():
            if options.format == "npy":
                source = source.with_channels(probe(source).channels)
            writer = WRITERS[options.format](manifest, split, source)
            writer.check()
            records = _readable(writer, options, before, progress)
            for first in records:  # the first image of a part
                writer.add(chain([first], records), options.shard_mib * 2**20)
            writer.finish()
            before += len(source)
        if not manifest.images:
            example = f", the first: {': '.join(bad.items[0])}" if bad.items else ""
            raise DataError(f"none of {bad.total:,} images can be read: nothing to pack{example}", "check the data")
        manifest.save(complete=True)
    except (ConfigError, DataError, OSError) as error:
        if not resumed and (isinstance(error, ConfigError) or not manifest.parts):  # a second call would fail again
            manifest.forget()
        if isinstance(error, OSError):
            raise DataError(f"cannot write to {out}: {reason_of(error)}", "free space, then run it again") from error
        raise
    finally:
        for left_over in out.glob(f"*{_PARTIAL}"):  # also those of a killed process
            if not left_over.name.endswith(f".npy{_PARTIAL}"):  # an array, whose finished parts are kept
                left_over.unlink()
    nbytes = sum(file.stat().st_size for file in out.iterdir() if file.name != _MANIFEST)
    return Packed(manifest.images, nbytes, len({part.name for part in manifest.parts}), resumed, bad.items)


def _write_classes(out: Path, splits: Mapping[str, Source]) -> None:
    """Writes the names of the classes, one per line; ConfigError: a name with a line end."""
    classes = max((source.classes or () for source in splits.values()), key=len)
    if odd := next((name for name in classes if len(f"{name}.".splitlines()) > 1), None):
        raise ConfigError(f"the class {odd!r} has a line end in its name", "rename it, or choose the format parquet")
    if classes:
        replace_file(out / CLASSES_FILE, "\n".join((*classes, "")).encode(), DataError)


@dataclass
class _Manifest:
    """The file in a pack that records the source, the options and the finished parts."""

    out: Path
    task: dict[str, Any]
    bad: BadFiles
    parts: list[Part] = field(default_factory=list)

    @classmethod
    def load(cls, out: Path, task: dict[str, Any], bad: BadFiles) -> _Manifest:
        """Opens or creates the manifest of a folder; ConfigError: the folder holds something else."""
        path = out / _MANIFEST
        if path.is_file():
            try:
                state = json.loads(path.read_text(encoding="utf-8"))
                if state["task"] == task:
                    for name, reason in state["bad"]:
                        bad.add(name, reason)
                    return cls(out, task, bad, [Part(**part) for part in state["files"]])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path} is damaged", "remove the folder, or choose another") from error
            raise ConfigError(f"{out} was packed from other data or options", "choose another folder, or remove it")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} exists and is not an empty folder", "choose another")
        manifest = cls(out, task, bad)
        manifest.save()
        return manifest

    @property
    def images(self) -> int:
        return sum(part.images for part in self.parts)

    def save(self, *, complete: bool = False) -> None:
        state = {
            "task": self.task,
            "complete": complete,
            "files": [part._asdict() for part in self.parts],
            "bad": sorted(self.bad.items),
        }
        replace_file(self.out / _MANIFEST, json.dumps(state, indent=1).encode(), DataError)

    def forget(self) -> None:
        """Removes the manifest, the files that it lists, and unfinished files."""
        names = {_MANIFEST, CLASSES_FILE}
        for part in self.parts:
            names |= {part.name, f"{part.name}{INDEX_SUFFIX}", f"{part.split}_labels.npy"}
        for path in [*(self.out / name for name in names), *self.out.glob(f"*{_PARTIAL}")]:
            path.unlink(missing_ok=True)


def _readable(writer: _Writer, options: PackOptions, before: int, progress: Progress | None) -> Iterator[Record]:
    """The readable images of a split that are not packed yet, in order; `before` counts those of earlier splits."""
    source, bad = writer.source, writer.manifest.bad
    indices = np.arange(writer.next, len(source))
    contents = zip(indices.tolist(), map_samples(source, indices, partial(_content, source, options)), strict=True)
    for index, content in tracked(contents, progress, "packing", bad.total, before + writer.next):
        writer.next = index + 1
        if isinstance(content, DataError):
            bad.add(source.name(index), content.problem)
        else:
            label = -1 if source.labels is None else int(source.labels[index])
            yield Record(index, source.name(index), label, content)


def _content(source: Source, options: PackOptions, index: int) -> bytes | Image | DataError:
    """The content to write: pixel values, the source's own file if it need not change, or a newly encoded file."""
    try:
        item = source.open(index)
        image, valid = item.read_valid()  # always, to leave out unreadable images
        if valid is not None and image.dtype.kind == "f":
            image[~valid] = np.nan
        elif valid is not None:
            image = item.read()  # integers have no value for "no data" that every reader knows
        is_small = options.max_size is None or max(image.shape[:-1]) <= options.max_size
        image = image if is_small else reduce(image, options.max_size or 0)
        if options.format == "npy":
            return np.ascontiguousarray(image, dtype=image.dtype.newbyteorder("<"))
        raw = source.encoded(index) or b""
        form = format_of(raw)
        if form is not None and is_small and _is_plain(raw, options):
            return raw
        is_lossy = form in (FORMATS["jpeg"], FORMATS["webp"])
        return encode(image, options.quality if is_lossy and not is_small else None)
    except DataError as error:
        return error


def _is_plain(raw: bytes, options: PackOptions) -> bool:
    """Whether a file gives the same image without the options for reading."""
    odd = {"nodata", "pages", "axes", "channels", "spacing", "clip", "spectrogram"} & options.changed().keys()
    return not odd and (options.truncated == "skip" or not raw.startswith(b"\xff\xd8") or jpeg.is_whole(raw))


def reduce(image: Image, max_size: int) -> Image:
    """Resizes an image (H, W, C) so that its longer side has `max_size` pixels, by Pillow's antialiased bicubic."""
    if image.ndim != 3:
        raise ConfigError(f"images with {image.ndim - 1} dimensions cannot be reduced", "leave max_size out")
    factor = max_size / max(image.shape[:2])
    height, width = (max(1, round(length * factor)) for length in image.shape[:2])
    exact = image if image.dtype == np.uint8 else image.astype(np.float32)
    planes = (Pillow.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(exact, -1, 0))
    reduced = np.stack([np.asarray(p.resize((width, height), Pillow.Resampling.BICUBIC)) for p in planes], -1)
    if image.dtype == np.uint16:
        reduced = np.clip(np.rint(reduced), 0, np.iinfo(np.uint16).max)
    return reduced.astype(image.dtype)


def encode(image: Image, quality: int | None) -> bytes:
    """Encodes an image (*size, C): as JPEG if `quality` is given and it has 8 bits, else PNG, or .npy if PNG cannot."""
    buffer = io.BytesIO()
    channels = {"uint8": (1, 3), "uint16": (1,)}.get(str(image.dtype), ())
    if image.ndim != 3 or image.shape[2] not in channels:
        np.save(buffer, image.view([(CHANNELS, image.dtype, image.shape[-1:])])[..., 0])
        return buffer.getvalue()
    picture = Pillow.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    if quality is None or image.dtype != np.uint8:
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _described(content: bytes, label: int) -> bytes:
    return f"{len(content)},{label}\n".encode() + content


class _Writer(ABC):
    """Writes the images of one split into files, and records each finished part in the manifest."""

    suffix: str

    def __init__(self, manifest: _Manifest, split: str, source: Source) -> None:
        self.manifest, self.out, self.split, self.source = manifest, manifest.out, split, source
        self.parts = [part for part in manifest.parts if part.split == split]
        self.next = self.parts[-1].stop if self.parts else 0  # index of the first image that is not packed

    @property
    def path(self) -> Path:
        """The file that is written next."""
        return self.out / f"{self.split}-{len(self.parts):06d}{self.suffix}"

    @property
    def partial(self) -> Path:
        """The file's temporary name."""
        return self.path.with_name(f"{self.path.name}{_PARTIAL}")

    def add(self, records: Iterator[Record], limit: int) -> None:
        """Packs at least one image, and more until they have `limit` bytes."""
        images = nbytes = 0
        written, found = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)

        def until_full() -> Iterator[Record]:
            nonlocal images, nbytes
            for record in records:
                content = record.content if isinstance(record.content, bytes) else record.content.tobytes()
                written.update(_described(content, record.label))
                yield record
                images, nbytes = images + 1, nbytes + len(content)
                if nbytes >= limit:
                    return

        self.write(until_full())
        with self.partial.open("rb") as file:
            os.fsync(file.fileno())
        for content, label in self.read():
            found.update(_described(content, label))
        if found.digest() != written.digest():
            raise DataError(f"{self.path} does not hold what was written", "check the disk, then run it again")
        size = self.partial.stat().st_size
        part = self.commit(Part(self.split, self.path.name, self.next, images, written.hexdigest(), nbytes=size))
        self.parts.append(part)
        self.manifest.parts.append(part)
        self.manifest.save()

    @abstractmethod
    def write(self, records: Iterator[Record]) -> None:
        """Writes all of `records` to `partial`."""

    @abstractmethod
    def read(self) -> Iterator[tuple[bytes, int]]:
        """The images and labels of the last `write`, read from `partial`."""

    def commit(self, part: Part) -> Part:
        """Gives the file its name."""
        self.partial.replace(self.path)
        return part

    def check(self) -> None:
        """Raises DataError unless all recorded parts exist with their recorded sizes."""
        for part in self.parts:
            path = self.out / part.name
            size = path.stat().st_size if path.is_file() else 0
            if not size or size != (part.nbytes or size):
                what = f"has {size:,} bytes and had {part.nbytes:,}" if size else "is gone"
                raise DataError(f"{path} {what}, though it was packed before", _PACK_AGAIN)

    def finish(self) -> None:
        """The last step, after all parts."""
        return


class _ParquetWriter(_Writer):
    """Parquet files in the schema of the `datasets` library."""

    suffix = ".parquet"

    def write(self, records: Iterator[Record]) -> None:
        arrow, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
        fields = [("image", arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())]))]
        features: dict[str, Any] = {"image": {"_type": "Image"}}
        if self.source.labels is not None:
            fields.append(("label", arrow.int64()))
            names = self.source.classes
            plain = {"dtype": "int64", "_type": "Value"}
            features["label"] = {"names": list(names), "_type": "ClassLabel"} if names else plain
        schema = arrow.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})
        with parquet.ParquetWriter(self.partial, schema, compression="none", use_dictionary=False) as file:
            while some := list(islice(records, _ROWS)):
                images = [{"bytes": record.content, "path": PurePath(record.name).name} for record in some]
                columns = {"image": images, "label": [record.label for record in some]}
                file.write_table(arrow.Table.from_pydict(columns, schema))

    def read(self) -> Iterator[tuple[bytes, int]]:
        table = ParquetTable(self.partial)
        labels = [-1] * table.num_rows if table.label is None else table.labels().tolist()
        return zip(table.images(), labels, strict=True)


class _ShardWriter(_Writer):
    """WebDataset shards, each with an index file."""

    suffix = ".tar"

    def write(self, records: Iterator[Record]) -> None:
        with tarfile.open(self.partial, "w", format=tarfile.USTAR_FORMAT) as archive:
            for record in records:
                assert isinstance(record.content, bytes)
                form = format_of(record.content)
                assert form is not None
                members = {PACKED_ARRAY if form is FORMATS["npy"] else form.suffixes[0]: record.content}
                if record.label >= 0:
                    members[".cls"] = str(record.label).encode()
                for suffix, content in members.items():
                    member = tarfile.TarInfo(f"{record.index:09d}{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))

    def read(self) -> Iterator[tuple[bytes, int]]:
        size = self.partial.stat().st_size
        index = build_index(self.partial, size)
        with self.partial.open("rb") as file:
            for offset, length, label in zip(index.offsets, index.sizes, index.labels, strict=True):
                file.seek(int(offset))
                yield file.read(int(length)), int(label)
        write_index(self.path.with_name(f"{self.path.name}{INDEX_SUFFIX}"), index, size)


class _ArrayWriter(_Writer):
    """One .npy file of images and one of labels, named as in an .npz file; a part is a range of rows."""

    def __init__(self, manifest: _Manifest, split: str, source: Source) -> None:
        super().__init__(manifest, split, source)
        self._labels = [label for part in self.parts for label in part.labels or []]  # of all rows written so far
        self._labels_path = self.out / f"{split}_labels.npy"

    @property
    def path(self) -> Path:
        return self.out / f"{self.split}_images.npy"

    def write(self, records: Iterator[Record]) -> None:
        array: Any = None
        for record in records:
            image = record.content
            assert isinstance(image, np.ndarray)
            if array is None:
                array = self._open(image)
            if image.shape != array.shape[1:] or image.dtype != array.dtype:
                before, now = (f"{'x'.join(map(str, x.shape))} {x.dtype}" for x in (array[0], image))
                problem = f"one array cannot hold them: {before} before, {record.name} is {now}"
                raise ConfigError(problem, "choose the format parquet or wds")
            array[len(self._labels)] = image
            self._labels.append(record.label)
        array.flush()

    def _open(self, image: Image) -> Any:
        """The memory-mapped array with a row for every image of the source: new, or with the rows of all parts."""
        if self.parts:
            array = npy.open_memmap(self.partial, mode="r+") if self.partial.exists() else None
            if array is None or len(array) != len(self.source):
                raise DataError(f"{self.partial} has lost rows", _PACK_AGAIN)
            return array
        shape = (len(self.source), *image.shape)
        array = npy.open_memmap(self.partial, mode="w+", dtype=image.dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):  # a full disk would otherwise kill the process while it writes a row
            with self.partial.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, self.partial.stat().st_size)
        return array

    def read(self) -> Iterator[tuple[bytes, int]]:
        start = sum(part.images for part in self.parts)
        rows = map_array(self.partial)[start : len(self._labels)]
        return ((row.tobytes(), label) for row, label in zip(rows, self._labels[start:], strict=True))

    def commit(self, part: Part) -> Part:
        """Keeps the temporary name, because more rows may follow."""
        return part._replace(labels=self._labels[-part.images :])

    def check(self) -> None:
        if self.parts and not self.partial.exists():  # else `_open` checks the rows
            for path in [self.path] if self.source.labels is None else [self.path, self._labels_path]:
                if not path.is_file():
                    raise DataError(f"{path} is gone, though it was packed before", _PACK_AGAIN)
            if len(map_array(self.path)) != len(self._labels):
                raise DataError(f"{self.path} has lost rows", _PACK_AGAIN)

    def finish(self) -> None:
        """Cuts the rows of unreadable images off and gives the file its name."""
        if not self.partial.exists():  # done by an earlier call
            return
        array: Any = npy.open_memmap(self.partial, mode="r+")
        rows = array[: len(self._labels)]
        header, start, nbytes = npy.header_data_from_array_1_0(rows), array.offset, rows.nbytes
        del array, rows
        with self.partial.open("r+b") as file:
            npy.write_array_header_1_0(file, header)
            assert file.tell() == start  # NumPy leaves room for any number of rows
            file.truncate(start + nbytes)
            os.fsync(file.fileno())
        if self.source.labels is not None:
            labels = np.array(self._labels, dtype=np.int64)
            replace_file(self._labels_path, lambda file: np.save(file, labels), DataError)
        self.partial.replace(self.path)


WRITERS: dict[str, type[_Writer]] = {"parquet": _ParquetWriter, "wds": _ShardWriter, "npy": _ArrayWriter}
