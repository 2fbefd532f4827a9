"""Samples in arrays: in memory, mapped from .npy files, in HDF5 and Zarr; what their axes mean; what is held."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchmae.data.items import ArrayItem, Context, Image, Item, Progress, prepared, stored_type, tracked
from torchmae.data.reading import BadFiles, first_readable, read_many
from torchmae.data.sources import Labels, Source, Subset, digest, evenly_spaced
from torchmae.data.transforms import to_device
from torchmae.errors import ConfigError, DataError, TorchmaeError, reason_of, require
from torchmae.machine import GIB, memory

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
ZARR_SUFFIX = ".zarr"

# What the names of the arrays `images` and `labels` may begin with, and the split that it means.
PREFIXES = (("", "train"), ("train_", "train"), ("val_", "val"), ("test_", "test"))

_FEW = 16  # channels that an axis may be taken for
_SURE = 4  # channels that a last axis is taken for whatever the others are
_ELONGATED = 3  # a picture whose sides differ more may as well be a signal
_CHECKED_AT_ONCE = 2**24  # values


def sample_axes(shape: tuple[int, ...], context: Context, title: str) -> tuple[int | None, str]:
    """The channel axis of a sample (None: one channel without an axis), and how its axes were taken, "" if plain.

    It is as `context.axes` says, else by the one reading that the shape has. Messages call the samples `title`.
    DataError: a shape with several readings, or none. ConfigError: it does not fit `context.axes`, or
    `context.spatial_dims`, the number of axes that the model takes for spatial.
    """
    dims, axes = context.spatial_dims, context.axes
    times = " x ".join(map(str, shape))
    problem = f"{title} has samples of shape {times}"
    if 0 in shape:
        raise DataError(f"{problem}: they are empty", "save at least one value")
    if axes is not None:
        spatial = len(axes.replace("C", ""))
        if len(axes) != len(shape):
            raise ConfigError(f"data.axes is {axes!r} and {problem}", f"give {len(shape)} letters")
        if dims not in (None, spatial):
            problem = f"data.axes {axes!r} has {spatial} axes beside channels and model.input_size {dims} numbers"
            raise ConfigError(problem, f"give model.input_size {spatial} numbers, or other axes")
        return axes.index("C") if "C" in axes else None, ""
    if dims is None and len(shape) not in (1, 2, 3, 4):
        raise DataError(problem, "samples are (*size) or (*size, channels), 1 to 3 numbers in size")
    if dims is not None and len(shape) not in (dims, dims + 1):
        fix = "give model.input_size a number for each axis that is not channels"
        raise ConfigError(f"{problem} and model.input_size has {dims} numbers", fix)
    if len(shape) == 1 or (dims == len(shape) and len(shape) < 3):
        return None, ""
    readings = _readings(shape, dims)
    if context.num_channels is not None and context.channels is None:  # which may tell them apart
        fitting = [axes for axes in readings if context.num_channels == (shape[axes.index("C")] if "C" in axes else 1)]
        readings = fitting[:1] or readings
    if len(readings) != 1:
        readings = readings or _all_readings(shape, dims)
        words = ", ".join(f"{axes} ({_words(axes)})" for axes in readings)
        raise DataError(f"{problem}, which may be read as {words}", f"say which: --data.axes {readings[0]}")
    axes = readings[0]
    is_plain = dims == len(shape) or (axes.endswith("C") and shape[-1] <= _SURE)
    note = "" if is_plain else f"{times} read as {axes} ({_words(axes)})"
    return axes.index("C") if "C" in axes else None, note


def _readings(shape: tuple[int, ...], dims: int | None) -> list[str]:
    """The plausible meanings of the axes of a sample, the likeliest first; of two axes or more."""
    low, high = min(shape), max(shape)
    last, first = shape[-1], shape[0]
    few_last, few_first = last <= _FEW, first <= _FEW
    square = first == shape[1] and first != last
    if square and max(shape[1:]) >= _ELONGATED * min(shape[1:]):
        few_first = False  # a long last axis behind two equal ones is no side of a picture
    if len(shape) == 2:
        if dims == 1:
            return ["LC"] if last < first else ["CL", "LC"]
        return ["HW"] if high < _ELONGATED * low else ["HW", "CL" if first < last else "LC"]
    sure = last <= _SURE and last < min(shape[:-1])
    space, volume = ("HW", "ZYX") if len(shape) == 3 else ("ZYX", "")
    if dims == len(shape):
        return [volume]
    if sure or (few_last and first > last):
        return [f"{space}C"]
    found = [f"{space}C"] if few_last or square else []
    if few_first or (len(set(shape[1:])) == 1 and first != last):
        found.append(f"C{space}")
    if volume and dims is None:
        found.append(volume)
    return found or _all_readings(shape, dims)


def _all_readings(shape: tuple[int, ...], dims: int | None) -> list[str]:
    by_length = {2: ["HW", "LC", "CL"], 3: ["HWC", "CHW", "ZYX"], 4: ["ZYXC", "CZYX"]}
    return [axes for axes in by_length[len(shape)] if dims is None or len(axes.replace("C", "")) == dims]


def _words(axes: str) -> str:
    kind = {1: "signals", 2: "pictures", 3: "volumes"}[len(axes.replace("C", ""))]
    where = {0: "channels first", len(axes) - 1: "channels last", -1: "one channel"}[axes.find("C")]
    return f"{kind}, {where}"


class ArraySource(Source):
    """Samples along the first axis of one array, (N, ...) of any integers, floats or bool: NumPy's or a `FileArray`.

    Messages call the samples `title`. Errors as of `sample_axes`, and DataError for an array that is no set of samples.
    """

    def __init__(
        self,
        images: Any,
        labels: npt.ArrayLike | None = None,
        classes: Sequence[str] | None = None,
        *,
        title: str = "array",
        context: Context = Context(),
    ) -> None:
        try:
            stored_type(np.dtype(images.dtype))
        except DataError as error:
            raise DataError(f"{title} {error.problem}", error.fix) from None
        if len(images.shape) < 2 or not images.shape[0]:
            fix = "it should be (samples, *size) or (samples, *size, channels)"
            raise DataError(f"{title} has shape {images.shape}", fix)
        self._axis, note = sample_axes(tuple(images.shape[1:]), context, title)
        self.images = images
        self.remarks = (note,) if note else ()
        self._take_labels(labels, classes)
        self._title = title
        self._context = context

    def __len__(self) -> int:
        return int(self.images.shape[0])

    def open(self, index: int) -> Item:
        return prepared(ArrayItem(self.images, self._axis, place=index), self._context)

    def name(self, index: int) -> str:
        return f"{self._title}/{index}"

    def fingerprint(self) -> str:
        """Of shape, type and the content of 64 samples."""
        shape = tuple(self.images.shape) if self._axis is not None else (*self.images.shape, 1)
        sample = (np.ascontiguousarray(self.images[int(i)]).tobytes() for i in evenly_spaced(len(self), 64))
        return digest([shape, self.images.dtype, b"".join(sample)])

    def stamp(self) -> str:
        """When its file was changed, in nanoseconds; "" in memory."""
        return str(self.images.path.stat().st_mtime_ns) if isinstance(self.images, FileArray) else ""

    def with_channels(self, channels: int) -> ArraySource:
        """The source itself; ConfigError where `channels` is not what the array has."""
        have = self.open(0).channels
        if channels != have:
            problem = f"{self._title} has {have} channels and the model takes {channels}"
            raise ConfigError(problem, f"set model.in_chans to {have}, or leave it out")
        return self

    def whole(self) -> tuple[Image, npt.NDArray[np.int64] | None] | None:
        array = self.images.array if isinstance(self.images, FileArray) else self.images
        usable = isinstance(array, np.ndarray) and array.dtype in (np.uint8, np.uint16, np.float32)
        context = self._context
        as_stored = context.channels is None and isinstance(context.nodata, str) and isinstance(context.spacing, str)
        as_stored = as_stored and not isinstance(context.clip, tuple)
        if not usable or not array.flags.writeable or not as_stored:
            return None
        return (array[..., None] if self._axis is None else np.moveaxis(array, self._axis + 1, -1)), None


class FileArray:
    """An array in a file, of which only what is asked for is read. Each process opens the file for itself.

    `path` is a .npy file, or an HDF5 file or Zarr store with the array `name`. DataError: it cannot be opened.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        self.path, self._name = path, name
        self._opened: tuple[int, Any] | None = None
        self.shape: tuple[int, ...] = tuple(self.array.shape)
        self.dtype = np.dtype(self.array.dtype)

    @property
    def array(self) -> Any:
        """The array as its library gives it: mapped, for a .npy file."""
        # Neither h5py's nor zarr's open files may be used on both sides of a fork.
        if self._opened is None or self._opened[0] != os.getpid():
            is_store = self.path.suffix.lower() in (*HDF5_SUFFIXES, ZARR_SUFFIX)
            self._opened = os.getpid(), open_store(self.path)[self._name] if is_store else map_array(self.path)
        return self._opened[1]

    def __getitem__(self, index: Any) -> Image:
        try:
            return np.asarray(self.array[index])
        except Exception as error:  # damaged chunks fail as each compressor sees fit
            raise DataError(reason_of(error)) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


def map_array(path: Path) -> Image:
    """Maps a .npy file into memory; nothing is read before it is used, and writing does not reach the file."""
    with _npy_errors(path):
        array: Image = np.load(path, mmap_mode="c", allow_pickle=False)
        return array


def read_npy(data: bytes) -> Image:
    """The array of a .npy file; it takes no more memory than the file has bytes."""
    with _npy_errors():
        array: Image = np.load(io.BytesIO(data), allow_pickle=False)
        return array


@contextmanager
def _npy_errors(path: Path | None = None) -> Iterator[None]:
    """What is wrong with a .npy or .npz file that NumPy cannot read becomes a DataError."""
    try:
        yield
    except DataError:
        raise
    except (
        Exception
    ) as error:  # a damaged file fails as NumPy's parser, zlib, zipfile or the memory it asks for see fit
        reason, fix = reason_of(error), "save one numeric array with numpy.save"
        if "Object arrays" in reason or "Python objects in dtype" in reason:
            reason = "it holds objects, such as samples of unequal length"
            fix = "save each sample as a .npy file of its own in one folder; they are cropped to model.input_size"
        elif not isinstance(error, OSError) and (" at 0x" in reason or not isinstance(error, (ValueError, EOFError))):
            reason = "its header is damaged"
        raise DataError(f"cannot read {path}: {reason}" if path else reason, fix) from error


def unpacked_bytes(arrays: Any, names: Iterable[str] | None = None) -> int:
    """Bytes that some arrays of an opened .npz file (None: all) say they take; NumPy never reads more than that."""
    wanted = set(arrays.files if names is None else names)
    return sum(item.file_size for item in arrays.zip.infolist() if item.filename.removesuffix(".npy") in wanted)


def named_arrays(
    arrays: Mapping[str, Any], context: Context, title: str, classes: Sequence[str] | None = None
) -> dict[str, Source]:
    """The splits of arrays called images and labels, train_images and so on, or of one of any name; DataError: none."""
    prefixes = {split: prefix for prefix, split in PREFIXES if f"{prefix}images" in arrays}
    names = {split: f"{prefix}images" for split, prefix in prefixes.items()}
    others = [name for name in arrays if not name.endswith("labels") and name != context.group]
    if not names and len(others) == 1:
        names, prefixes = {"train": others[0]}, {"train": ""}
    if "train" not in names:
        found = f"{title} holds {', '.join(arrays) or 'no arrays'}"
        raise DataError(found, "it needs an array named images (and may have labels)")
    splits: dict[str, Source] = {}
    for split, images in names.items():
        prefix = prefixes[split]
        known = np.asarray(arrays[labels][...]) if (labels := f"{prefix}labels") in arrays else None
        name = f"{title}/{images}".rstrip("/")
        source = splits[split] = ArraySource(arrays[images], known, classes, title=name, context=context)
        if context.group is not None and (group := prefix + context.group) in arrays:
            source.groups = np.asarray(arrays[group][...]).astype(str)
            if source.groups.shape != (len(source),):
                problem = f"{title}/{group} has shape {source.groups.shape}"
                raise DataError(problem, f"give one group for each of the {len(source)} samples")
    return splits


def npz_splits(path: Path, context: Context, max_bytes: float | None = None) -> dict[str, Source]:
    """The splits of an .npz file: arrays named as for `named_arrays`, in memory, of which they may take `max_bytes`."""
    limit = memory() if max_bytes is None else max_bytes
    with _npy_errors(path), path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        ends = ("images", "labels", *([context.group] if context.group else []))
        wanted = [name for name in arrays.files if name.endswith(ends)]
        wanted = wanted if any(name.endswith("images") for name in wanted) else arrays.files
        if (needed := unpacked_bytes(arrays, wanted)) > limit:
            problem = f"{path} unpacks to {needed / GIB:.1f} GiB and there are {limit / GIB:.1f} GiB of memory"
            raise DataError(problem, "save its images as .npy, of which only what is needed is read")
        held = {name: arrays[name] for name in wanted}
    # A member that is no array comes as bytes.
    return named_arrays({name: x for name, x in held.items() if isinstance(x, np.ndarray)}, context, path.name)


def open_store(path: Path) -> dict[str, Any]:
    """The arrays of an HDF5 file or a Zarr store by name; a store that is a single array has the name "".

    Links out of an HDF5 file are left alone. DataError: an array that is pickled, or lies in other files.
    ConfigError: the library is not installed. A damaged store raises whatever its library does.
    """
    if path.suffix.lower() == ZARR_SUFFIX:
        store = require("zarr", "arrays").open(path, mode="r")
        arrays = {"": store} if hasattr(store, "shape") else dict(sorted(store.arrays()))
        for name, array in arrays.items():
            if "pickle" in str(array.metadata.to_dict()).lower():
                raise DataError(f"{path}/{name} holds pickled objects, which may run anything", "save plain numbers")
        return arrays
    store = require("h5py", "arrays").File(path, "r")
    own = [name for name in store if type(store.get(name, getlink=True)).__name__ == "HardLink"]
    datasets = {name: store[name] for name in own if hasattr(store[name], "shape")}
    for name, dataset in datasets.items():
        if dataset.external or dataset.is_virtual:
            raise DataError(f"{path}/{name} takes its values from other files", "copy them into the file itself")
    return datasets


def stored_splits(path: Path, context: Context) -> dict[str, Source]:
    """The splits of an HDF5 file or a Zarr store: arrays named as in an .npz file, or a single array of any name."""
    try:
        return named_arrays({name: FileArray(path, name) for name in open_store(path)}, context, path.name)
    except TorchmaeError:
        raise
    except Exception as error:  # h5py and zarr have no common error
        raise DataError(f"cannot read {path}: {reason_of(error)}", "is it a whole file?") from error


class DoesNotFitError(Exception):
    """Why images cannot be held in memory."""


@dataclass(frozen=True)
class Held:
    """All images of a source."""

    images: Tensor  # (M, C, *size), uint8, uint16 or float32; on the CPU, unless they were moved
    rows: npt.NDArray[np.int64] | None  # (N,) the row of each image; None: they are in order
    labels: Labels | None  # (N,), of an unreadable image its stand-in's; None: nothing has a label
    valid: Tensor | None = None  # (M, 1, *size) bool, where there is data, beside `images`; None: everywhere

    def gather(
        self, indices: npt.NDArray[np.int64], boxes: npt.NDArray[np.int64] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, C, *size) copies of some images, and of `valid`; of `boxes`, (B, n, 2) of one size, these alone."""
        rows = indices if self.rows is None else self.rows[indices]
        chosen = to_device(torch.from_numpy(rows), self.images.device)

        def take(images: Tensor) -> Tensor:
            if boxes is None or not len(rows):
                return images[chosen]
            pairs = zip(rows.tolist(), boxes.tolist(), strict=True)
            parts: list[Any] = [
                (row, slice(None), *(slice(start, start + length) for start, length in box)) for row, box in pairs
            ]
            return torch.stack([images[part] for part in parts])

        valid = None if self.valid is None else take(self.valid)
        if self.images.dtype == torch.uint16:  # few kernels know it: CUDA's for this one does not
            return take(self.images.view(torch.int16)).view(torch.uint16), valid
        return take(self.images), valid

    def share(self, index: int, box: npt.NDArray[np.int64]) -> float:
        """The share of the pixels of a box, (n, 2), of an image that hold data."""
        assert self.valid is not None
        row = index if self.rows is None else int(self.rows[index])
        part = tuple(slice(start, start + length) for start, length in box.tolist())
        return float(self.valid[row, 0][part].float().mean())

    def repeated(self, indices: npt.NDArray[np.int64]) -> Held:
        """The images with these indices, in this order; one may come many times."""
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, rows=indices if self.rows is None else self.rows[indices], labels=labels)

    def source(self) -> Source:
        """The same images, read from memory; not where they were moved to a device."""
        images = self.images.movedim(1, -1).numpy()
        source = ArraySource(images, title="images", context=Context(axes=" LHD"[1 : images.ndim - 1] + "C"))
        return source if self.rows is None else Subset(source, self.rows)


def hold(source: Source, limit: float, bad: BadFiles, progress: Progress | None = None) -> Held:
    """Brings all images of a source into memory; an array that is there already is not copied.

    Neighbours stand in for the `bad` ones. DoesNotFitError: more than `limit` bytes, or of several sizes or types.
    """
    whole = source.whole()
    if whole is None:
        return _decode_all(source, limit, bad, progress)
    images, rows = whole
    _check_limit(images.nbytes, limit)
    if images.dtype.kind == "f":
        step = max(1, _CHECKED_AT_ONCE // max(1, math.prod(images.shape[1:])))
        if not all(np.isfinite(images[i : i + step]).all() for i in range(0, len(images), step)):
            return _decode_all(source, limit, bad, progress)
    return Held(torch.from_numpy(images).movedim(-1, 1), rows, source.labels)


def _check_limit(nbytes: int, limit: float) -> None:
    if nbytes > limit:
        raise DoesNotFitError(f"the images take {nbytes / GIB:.1f} GiB, and {limit / GIB:.1f} GiB are there for them")


def _decode_all(source: Source, limit: float, bad: BadFiles, progress: Progress | None) -> Held:
    first, (image, _) = first_readable(source, 0, [], source.read_valid)
    _check_limit(image.nbytes * len(source), limit)
    held = np.empty((len(source), image.shape[-1], *image.shape[:-1]), dtype=image.dtype)
    labels = None if source.labels is None else source.labels.copy()
    valid: Tensor | None = None  # made for the first image with pixels without data
    readings = read_many(source, np.arange(len(source)))
    for asked, read, (other, has_data), unread in tracked(readings, progress, "reading images", len(source)):
        for name, reason in unread:
            bad.add(name, reason)
        if (other.shape, other.dtype) != (image.shape, image.dtype):
            found = (
                f"{source.name(index)} is {'x'.join(map(str, values.shape))} {values.dtype}"
                for index, values in ((first, image), (read, other))
            )
            raise DoesNotFitError(f"the images differ: {', '.join(found)}")
        held[asked] = np.moveaxis(other, -1, 0)
        if has_data is not None:
            valid = torch.ones(len(source), 1, *image.shape[:-1], dtype=torch.bool) if valid is None else valid
            valid[asked, 0] = torch.from_numpy(has_data)
        if labels is not None and source.labels is not None:
            labels[asked] = source.labels[read]
    return Held(torch.from_numpy(held), None, labels, valid)
