"""Arrays in HDF5 and Zarr files, of which only the images that are asked for are read."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torchmae.data.sources import (
    Image,
    Source,
    check_type,
    checked_labels,
    digest,
    plain_type,
    spatial_axes,
    spread,
)
from torchmae.errors import ConfigError, DataError, TorchmaeError

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
ZARR_SUFFIX = ".zarr"

PREFIXES = (("", "train"), ("train_", "train"), ("val_", "val"), ("test_", "test"))
"""What the names of the arrays `images` and `labels` may begin with, and the split that it means."""


def open_store(path: Path) -> dict[str, Any]:
    """The arrays of an HDF5 file or a Zarr store by name; a store that is a single array has the name "".

    Links out of an HDF5 file are left alone.

    Raises:
        ConfigError: the library is not installed.
        DataError: an array whose values would be unpickled, or lie in files that it names.
        Exception: the library's own, of which h5py and zarr have many, where the store is damaged.
    """
    if path.suffix.lower() == ZARR_SUFFIX:
        store = _open_zarr(path)
        arrays = {"": store} if hasattr(store, "shape") else dict(sorted(store.arrays()))
        for name, array in arrays.items():
            if "pickle" in str(array.metadata.to_dict()).lower():
                raise DataError(f"{path}/{name} holds pickled objects, which may run anything", "save plain numbers")
        return arrays
    store = _open_hdf5(path)
    own = [name for name in store if type(store.get(name, getlink=True)).__name__ == "HardLink"]
    datasets = {name: store[name] for name in own if hasattr(store[name], "shape")}
    for name, dataset in datasets.items():
        if dataset.external or dataset.is_virtual:
            raise DataError(f"{path}/{name} takes its values from other files", "copy them into the file itself")
    return datasets


def _open_hdf5(path: Path) -> Any:
    try:
        library = importlib.import_module("h5py")
    except ImportError as error:
        raise ConfigError(f"{path}: HDF5 files need h5py", "pip install 'torchmae[arrays]'") from error
    return library.File(path, "r")


def _open_zarr(path: Path) -> Any:
    try:
        library = importlib.import_module("zarr")
    except ImportError as error:
        raise ConfigError(f"{path}: Zarr needs zarr", "pip install 'torchmae[arrays]'") from error
    return library.open(path, mode="r")


class StoredSource:
    """Images in one array of an HDF5 file or a Zarr store, which each process opens for itself.

    Args:
        path: the file, or the folder that a Zarr store is.
        name: of the array in it; "": the store is the array.
        labels: (N,) integers, -1 where unknown.
        spatial_dims: as in `ArraySource`.

    Raises:
        DataError: an array that is no set of images, with the way to make it one.
        ConfigError: its shape does not have `spatial_dims` spatial axes.
    """

    def __init__(
        self, path: Path, name: str, labels: npt.ArrayLike | None = None, spatial_dims: int | None = None
    ) -> None:
        self._path = path
        self._name = name
        self._title = f"{path.name}/{name}" if name else path.name
        self._opened: tuple[int, Any] | None = None
        array = self._array()
        self._shape, self._dtype = tuple(array.shape), np.dtype(array.dtype)
        check_type(self._dtype, self._title)
        dims = spatial_axes(self._shape, spatial_dims, self._title)
        self._add_axis = len(self._shape) == dims + 1
        self.labels = None if labels is None else checked_labels(labels, len(self), self._title)
        self.classes: tuple[str, ...] | None = None

    def _array(self) -> Any:
        # Neither library's open files may be used on both sides of a fork.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), open_store(self._path)[self._name]
        return self._opened[1]

    def __len__(self) -> int:
        return int(self._shape[0])

    def read(self, index: int) -> Image:
        """(*size, C): bool becomes uint8 0 and 255, any float float32."""
        try:
            image = np.asarray(self._array()[index])
        except Exception as error:  # damaged chunks fail as each compressor sees fit
            raise DataError(f"{self.name(index)}: {' '.join(str(error).split())[:200]}") from error
        return plain_type(image[..., None] if self._add_axis else image)

    def name(self, index: int) -> str:
        """The array and the index."""
        return f"{self._title}/{index}"

    def fingerprint(self) -> str:
        """Of shape, type and the content of 64 images."""
        return digest([self._shape, self._dtype, *(self.read(int(i)).tobytes() for i in spread(len(self), 64))])

    def with_channels(self, channels: int) -> StoredSource:
        """The source itself; ConfigError where `channels` is not what the array has."""
        have = 1 if self._add_axis else int(self._shape[-1])
        if channels != have:
            raise ConfigError(
                f"{self._title} has {have} channels and the model takes {channels}",
                f"set model.in_chans to {have}, or leave it out",
            )
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


def stored_splits(path: Path, spatial_dims: int | None = None) -> dict[str, Source]:
    """The splits of an HDF5 file or a Zarr store: arrays named as in an .npz file, or a single array of any name.

    Args:
        path: .h5, .hdf5, .hdf or .zarr.
        spatial_dims: as in `ArraySource`.

    Raises:
        ConfigError: the library that reads it is not installed.
        DataError: it cannot be read, or holds no images.
    """
    try:
        arrays = open_store(path)
        labels = {name: np.asarray(array[...]) for name, array in arrays.items() if name.endswith("labels")}
    except TorchmaeError:
        raise
    except Exception as error:  # h5py and zarr have no common error
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())[:200]}", "is it a whole file?") from error
    splits: dict[str, Source] = {}
    for prefix, split in PREFIXES:
        if f"{prefix}images" in arrays:
            splits[split] = StoredSource(path, f"{prefix}images", labels.get(f"{prefix}labels"), spatial_dims)
    others = [name for name in arrays if name not in labels]
    if not splits and len(others) == 1:
        splits["train"] = StoredSource(path, others[0], labels.get("labels"), spatial_dims)
    if "train" not in splits:
        raise DataError(
            f"{path} holds {', '.join(arrays) or 'no arrays'}", "it needs an array named images (and may have labels)"
        )
    return splits
