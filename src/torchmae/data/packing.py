"""Packs a data set into few large files, once, so that training reads it fast: parquet, tar shards or arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as Pillow

from torchmae.config import ReadOptions
from torchmae.data.formats import Image, Progress, quiet_pillow
from torchmae.data.pack_writers import WRITERS, PackedFile, Record, open_writer
from torchmae.data.reading import BadFiles, num_cores, probe
from torchmae.data.shards import CLASSES_FILE, INDEX_SUFFIX
from torchmae.data.sources import Source
from torchmae.errors import ConfigError, DataError, one_of, within
from torchmae.files import lock_file, replace_file

MANIFEST = "pack.json"
"""What was packed from what, and how far it got."""

_LOCK = ".lock"
_CHUNK = 64  # images under way at a time
_LOSSY = (b"\xff\xd8\xff", b"RIFF")  # JPEG and WebP begin with these


@dataclass(frozen=True)
class PackOptions(ReadOptions):
    """How to pack.

    Attributes:
        format: "parquet" (the Hugging Face schema), "wds" (WebDataset tar shards) or "npy" (one array, for images
            of one size).
        max_size: longest side in pixels; larger images are reduced to it, others kept byte for byte; null: all are.
        quality: JPEG quality, 1 to 100, of images that were reduced and had been compressed with loss; others stay
            lossless.
        shard_mib: MiB after which the next file begins.
        max_bad: share of the images that may be unreadable: each is left out and named, and one more ends the packing;
            0: none may.
        progress: "auto" (a bar on a terminal, else lines), "plain" or "none".
    """

    format: str = "parquet"
    max_size: int | None = None
    quality: int = 95
    shard_mib: int = 256
    max_bad: float = 0.01
    progress: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("format", self.format, WRITERS)
        one_of("progress", self.progress, ("auto", "plain", "none"))
        within("max_size", self.max_size, 8, float("inf"))
        within("quality", self.quality, 1, 100)
        within("shard_mib", self.shard_mib, 1, 65536)
        within("max_bad", self.max_bad, 0, 1)


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
    classes = next((source.classes for source in splits.values() if source.classes), None)
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
    except ConfigError:  # what does not fit the format will never do
        if not manifest.resumed:
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
    classes: tuple[str, ...] | None,
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
        with open_writer(options.format, out, split, source, done, options.shard_mib * 2**20) as writer:
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
        task = {"options": how, "data": {split: source.fingerprint() for split, source in splits.items()}}
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
            content = _array(source, index, options) if options.format == "npy" else _bytes(source, index, options)
        except DataError as error:
            return Record(index, name, label, None, str(error).removeprefix(f"{name}: "))
        return Record(index, name, label, content, None)

    with ThreadPoolExecutor(num_cores()) as pool:
        for first in range(start, len(source), _CHUNK):
            with quiet_pillow():
                records = list(pool.map(prepare, range(first, min(first + _CHUNK, len(source)))))
            yield from records


def _array(source: Source, index: int, options: PackOptions) -> Image:
    image = source.read(index)
    return image if _fits(image, options.max_size) else reduce(image, options.max_size or 0)


def _bytes(source: Source, index: int, options: PackOptions) -> bytes:
    """An image file: the source's own bytes where they need not change."""
    raw, image = source.encoded(index), source.open(index).read()  # so that what is packed can be read
    if raw is not None and _fits(image, options.max_size):
        return raw
    lossy = raw is not None and raw.startswith(_LOSSY)
    image = image if _fits(image, options.max_size) else reduce(image, options.max_size or 0)
    return encode(image, options.quality if lossy else None)


def _fits(image: Image, max_size: int | None) -> bool:
    return max_size is None or max(image.shape[:-1]) <= max_size


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
    """An image as a file: JPEG of some quality, else lossless (PNG; TIFF for float32).

    Args:
        image: (H, W, C) uint8 with 1 or 3 channels, uint16 or float32 with 1.
        quality: 1 to 100; None: lossless. Of no effect on more than 8 bits.

    Raises:
        ConfigError: an image that no such file can hold.
    """
    if image.ndim != 3 or image.shape[2] not in ((1, 3) if image.dtype == np.uint8 else (1,)):
        shape = "x".join(map(str, image.shape))
        raise ConfigError(f"no image file holds {shape} values of {image.dtype}", "choose the format npy")
    pixels = Pillow.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    buffer = BytesIO()
    if image.dtype.kind == "f":
        pixels.save(buffer, "TIFF")
    elif quality is None or image.dtype != np.uint8:
        pixels.save(buffer, "PNG")
    else:
        pixels.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
