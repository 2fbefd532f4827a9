"""Tar files of images (WebDataset shards) with random access through an index, which is built once and kept."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from torchmae.data.arrays import unpacked_bytes
from torchmae.data.formats import MAX_BYTES, TOO_LARGE, picture_suffixes
from torchmae.data.items import Context, tracked
from torchmae.data.remote import Place, RemoteBytes, beside, cache_folder, last_name, open_place, place_version, shown
from torchmae.data.sources import EncodedSource, Labels, Strings, digest, evenly_spaced
from torchmae.errors import DataError, printable, reason_of
from torchmae.files import replace_file

INDEX_SUFFIX = ".index.npz"  # added to a shard's name for an index in the same folder
ALL_MEMBERS = "all"  # a value of `data.member`: every picture of each sample
CLASSES_FILE = "classes.txt"  # the names of the classes, one per line, in the folder of the shards

_FORMAT = 2
_COLUMNS = ("offsets", "sizes", "labels", "samples")  # of an index
_CHECKED = 8  # headers that are compared with an index from the shard's folder before it is used
_LABEL_BYTES = 20
_NO_NUMBER = -2  # the label for a .cls file with text
_INDEX_HEAD = 2**14  # largest size in bytes of an index without images
_SHOWN = 8  # largest number of endings in a message
_FETCHERS = 16  # concurrent requests in each process


@dataclass(frozen=True)
class ShardIndex:
    """The N images of a tar file, in their order in the file."""

    names: Strings  # paths in the archive
    offsets: npt.NDArray[np.int64]  # (N,) first byte
    sizes: npt.NDArray[np.int64]  # (N,) number of bytes
    labels: Labels  # (N,) -1: unknown, -2: not a number
    samples: npt.NDArray[np.int64]  # (N,) number of the sample, from 0


class ShardSource(EncodedSource):
    """Images in uncompressed tar files (or their URLs), in the order of the files and of the images in them.

    Every member with the suffix of an image is an image. `0001.cls` holds the label of `0001.jpg` as a number. If
    samples have several pictures (`0001.jpg` and `0001.seg.png`), `context.member` chooses one. Nothing is unpacked.
    DataError: no tar file, compressed or damaged; no images; several pictures and no `member`.
    """

    def __init__(self, shards: Sequence[Place], context: Context = Context()) -> None:
        self._shards = list(shards)
        with ThreadPoolExecutor(_FETCHERS) as pool:
            self._versions = list(pool.map(place_version, shards))
            indexes = pool.map(lambda shard, version: open_index(shard, *version), shards, self._versions)
            each = zip(shards, tracked(indexes, context.progress, "indexing shards", len(shards)), strict=True)
            self._indexes = [_chosen(index, last_name(shard), context.member) for shard, index in each]
        self._starts = np.cumsum([0] + [len(index.sizes) for index in self._indexes])
        if not self._starts[-1]:
            raise DataError(f"{shown(str(shards[0]))} holds no images", f"accepted are {', '.join(picture_suffixes())}")
        labels = np.concatenate([index.labels for index in self._indexes])
        known = labels if (labels >= 0).any() else None
        super().__init__(len(labels), known, _class_names(shards[0], labels), context)
        if no_numbers := int((labels == _NO_NUMBER).sum()):
            self.remarks += (f"{no_numbers:,} .cls files of {last_name(shards[0])} hold no number and are not used",)
        self._remote = [
            RemoteBytes(shard, *version) if isinstance(shard, str) else None
            for shard, version in zip(shards, self._versions, strict=True)
        ]
        self._coming: dict[int, Future[bytes]] = {}
        self._fetchers: tuple[int, ThreadPoolExecutor] | None = None

    def _find(self, index: int) -> tuple[int, int]:
        """The number of an image's shard, and its row in the shard's index."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def encoded(self, index: int) -> bytes:
        coming = self._coming.pop(index, None)
        return self._read(index) if coming is None else coming.result()

    def _read(self, index: int) -> bytes:
        shard, row = self._find(index)
        start, size = int(self._indexes[shard].offsets[row]), int(self._indexes[shard].sizes[row])
        if size > MAX_BYTES:
            raise DataError(TOO_LARGE)
        if (remote := self._remote[shard]) is not None:
            return remote.read(start, start + size)
        try:
            with open_place(self._shards[shard]) as file:
                file.seek(start)
                return file.read(size)
        except OSError as error:
            raise DataError(reason_of(error)) from None

    def read_ahead(self, indices: npt.NDArray[np.int64]) -> None:
        """Starts to fetch remote images; earlier requests that nobody has read are cancelled."""
        if not any(self._remote):
            return
        if self._fetchers is None or self._fetchers[0] != os.getpid():  # threads do not follow into a forked process
            self._fetchers = os.getpid(), ThreadPoolExecutor(_FETCHERS, thread_name_prefix="torchmae-fetch")
            self._coming = {}
        for future in self._coming.values():
            future.cancel()
        self._coming = {index: self._fetchers[1].submit(self._read, index) for index in indices.tolist()}

    def name(self, index: int) -> str:
        shard, row = self._find(index)
        return f"{last_name(self._shards[shard])}/{printable(self._indexes[shard].names[row])}"

    def fingerprint(self) -> str:
        """A digest of the shards' names and sizes and of their images' names and offsets."""
        each = zip(self._shards, self._versions, self._indexes, strict=True)
        parts = ((last_name(shard), size, *index.names.parts, index.offsets) for shard, (size, _), index in each)
        return digest(chain.from_iterable(parts))

    def stamp(self) -> str:
        return digest(self._versions)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_coming": {}, "_fetchers": None}


def _class_names(shard: Place, labels: Labels) -> tuple[str, ...] | None:
    """The names in the shards' `CLASSES_FILE`; None: no such file, or too few names."""
    with suppress(OSError, DataError), open_place(beside(shard, CLASSES_FILE)) as file:
        names = file.read(2**20).decode("utf-8", "replace").splitlines()
        if len(names) > labels.max(initial=-1):
            return tuple(names)
    return None


def open_index(shard: Place, size: int, version: str) -> ShardIndex:
    """The index of a shard with this `place_version`: from the cache, from the shard's folder, or built and cached."""
    where = shard.absolute() if isinstance(shard, Path) else shard
    cached = cache_folder() / "index" / f"{digest([where, size, version, _FORMAT])}.npz"
    if (index := _read_index(cached, size)) is not None:
        return index
    index = _read_index(beside(shard, last_name(shard) + INDEX_SUFFIX), size)
    if index is None or not _agrees(index, shard):
        index = build_index(shard, size)
    with suppress(DataError):  # without a cache, the index is built again next time
        write_index(cached, index, size)
    return index


def write_index(path: Path, index: ShardIndex, size: int) -> None:
    """Saves the index of a shard of `size` bytes, whole or not at all; DataError: it cannot be written."""
    content, ends = index.names.parts
    arrays = {
        "size": np.array([size, _FORMAT]),
        "names": np.frombuffer(content, dtype=np.uint8),
        "ends": ends,
        **{name: getattr(index, name) for name in _COLUMNS},
    }
    replace_file(path, lambda file: np.savez(file, allow_pickle=False, **arrays), DataError)


def _read_index(place: Place, size: int) -> ShardIndex | None:
    """A saved index; None: it does not exist, is damaged, or belongs to a shard of another size."""
    try:
        with open_place(place) as file, np.load(file, allow_pickle=False) as arrays:
            if unpacked_bytes(arrays) > size + _INDEX_HEAD:  # an entry is smaller than a tar header
                return None
            expected = arrays["size"].tolist() == [size, _FORMAT]
            ends, *columns = (np.asarray(arrays[name], dtype=np.int64) for name in ("ends", *_COLUMNS))
            names = arrays["names"].astype(np.uint8).tobytes()
    except Exception:  # zip, NumPy and the network raise many errors; after any of them the index is built again
        return None
    index = ShardIndex(Strings.of(names, ends), *columns)
    fits = expected and ends.ndim == 1 and all(column.shape == ends.shape for column in columns)
    inside = fits and ((index.offsets >= 0) & (index.sizes >= 0) & (index.offsets <= size - index.sizes)).all()
    rising = fits and (np.diff(ends, prepend=0) >= 0).all() and ends.max(initial=0) == len(names)
    return index if inside and rising else None


def _chosen(index: ShardIndex, shard: str, member: str | None) -> ShardIndex:
    """The pictures that `member` chooses; DataError: several in one sample and no choice, or none at all."""
    if member == ALL_MEMBERS:
        return index
    endings = [] if member is None else [_parts(name)[1] for name in index.names]
    rows = np.arange(len(index.samples))
    if endings:
        rows = np.flatnonzero([ending == str(member).lower() for ending in endings])
    samples, counts = np.unique(index.samples[rows], return_counts=True)
    if (counts > 1).any():
        shared = np.flatnonzero(index.samples == samples[counts > 1][0]).tolist()
        pictures = [_parts(index.names[row]) for row in shared]
        example = f"{printable(pictures[0][0])} has {', '.join(ending for _, ending in pictures)}"
        problem = f"{int((counts > 1).sum()):,} samples of {shard} have several pictures: {example}"
        fix = f"choose one with --data.member {pictures[0][1]}, or --data.member {ALL_MEMBERS}"
        raise DataError(problem, fix)
    if not endings:
        return index
    if not len(rows):
        known = ", ".join(sorted(set(endings))[:_SHOWN])
        raise DataError(f"no sample of {shard} has a picture {member!r}", f"choose from {known}")
    names = Strings(index.names[row] for row in rows.tolist())
    return ShardIndex(names, *(getattr(index, name)[rows] for name in _COLUMNS))


def _agrees(index: ShardIndex, shard: Place) -> bool:
    """Whether the headers of a few evenly spaced members agree with an index."""
    with suppress(OSError, ValueError, tarfile.TarError), open_place(shard) as file:
        for row in evenly_spaced(len(index.sizes), _CHECKED):
            file.seek(int(index.offsets[row]) - tarfile.BLOCKSIZE)
            header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
            if header.size != index.sizes[row]:
                return False
        return True
    return False


def build_index(shard: Place, size: int) -> ShardIndex:
    """Builds an index from the headers of a tar file of `size` bytes; a remote file is read whole.

    DataError: no uncompressed tar file, or a damaged or incomplete one.
    """
    name = shown(str(shard))
    try:
        with open_place(shard) as file:
            return _scan(file, size, name)
    except tarfile.TarError as error:
        fix = "unpack it if it is compressed, and pack it again"
        raise DataError(f"{name} is no uncompressed tar file ({error})", fix) from error
    except OSError as error:
        raise DataError(f"cannot read {name}: {reason_of(error)}") from error
    except (ValueError, ArithmeticError) as error:  # impossible numbers in a header
        raise DataError(f"{name} is damaged ({error})", "copy it again") from error


def _scan(file: IO[bytes], size: int, name: str) -> ShardIndex:
    names: list[bytes] = []
    rows: list[tuple[int, int]] = []
    known = picture_suffixes()
    labels_of: dict[bytes, int] = {}  # by the path of the .cls file without its suffix
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
            if archive.offset <= member.offset:  # a negative size: the same header would come again for ever
                raise DataError(f"{name} is damaged at byte {member.offset:,}", "copy it again")
            if not member.isreg() or member.issparse() or PurePosixPath(member.name).name.startswith("."):
                continue
            if member.offset_data + member.size > size:
                raise DataError(f"{name} is cut short in {member.name}", "copy it again")
            path = member.name.encode("utf-8", "surrogateescape")
            if member.name.lower().endswith(known):
                names.append(path)
                rows.append((member.offset_data, member.size))
            elif path.lower().endswith(b".cls"):
                labels_of[path[:-4]] = _label(file, member)
        file.seek(archive.offset)
        if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
            raise DataError(f"{name} is damaged at byte {archive.offset:,}", "copy it again")
    offsets, sizes = np.array(rows, dtype=np.int64).reshape(-1, 2).T.copy()
    keys = _keys(names)
    number_of = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    pairs = zip(names, keys, strict=True)
    labels = [labels_of.get(name.rpartition(b".")[0], labels_of.get(key, -1)) for name, key in pairs]
    samples = [number_of[key] for key in keys]
    columns = (offsets, sizes, np.array(labels, dtype=np.int64), np.array(samples, dtype=np.int64))
    return ShardIndex(Strings(names), *columns)


def _keys(names: Sequence[bytes]) -> list[bytes]:
    """The sample of each picture: WebDataset's key, which is the path up to the first dot of the file name.

    Names may hold other dots (`scan.0001.jpg`): if there are more endings than keys, each picture is a sample.
    """
    split = [_parts(name) for name in names]
    if len({part for _, part in split}) <= max(1, len({key for key, _ in split})):
        return [key for key, _ in split]
    return [name.rpartition(b".")[0] for name in names]


def _parts(name: bytes) -> tuple[bytes, str]:
    """WebDataset's key and the ending after its dot, in lower case: b"0001" and "seg.png"."""
    folder, slash, file = name.rpartition(b"/")
    key, _, part = file.partition(b".")
    return folder + slash + key, part.decode("utf-8", "surrogateescape").lower()


def _label(file: IO[bytes], member: tarfile.TarInfo) -> int:
    """The number in a .cls file; -1: empty or negative, -2: not a number."""
    file.seek(member.offset_data)
    text = file.read(min(member.size, _LABEL_BYTES)).strip()
    if text.isdigit() and len(text) < _LABEL_BYTES - 1:
        return int(text)
    return -1 if not text or text.removeprefix(b"-").isdigit() else _NO_NUMBER
