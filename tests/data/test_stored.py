from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from torchmae.data.items import Context
from torchmae.data.layouts import open_splits
from torchmae.errors import ConfigError, DataError

IMAGES = np.random.default_rng(0).integers(0, 60000, (5, 7, 9, 4)).astype(np.uint16)


def write_hdf5(path: Path, arrays: dict[str, np.ndarray]) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, chunks=True, compression="gzip")


def write_zarr(path: Path, arrays: dict[str, np.ndarray]) -> None:
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(path, mode="w")
    for name, array in arrays.items():
        group.create_array(name, data=array, chunks=(1, *array.shape[1:]))


WRITERS = {"x.h5": write_hdf5, "x.zarr": write_zarr}


@pytest.mark.parametrize("name", WRITERS)
def test_splits_labels_and_images(tmp_path: Path, name: str) -> None:
    arrays = {"train_images": IMAGES, "train_labels": np.arange(5), "val_images": IMAGES[:2, ..., 0]}
    WRITERS[name](tmp_path / name, arrays)
    splits = open_splits(str(tmp_path / name))
    assert {split: len(source) for split, source in splits.items()} == {"train": 5, "val": 2}
    train = pickle.loads(pickle.dumps(splits["train"]))
    np.testing.assert_array_equal(train.read(3), IMAGES[3])
    assert train.read(3).dtype == np.uint16
    assert splits["val"].read(1).shape == (7, 9, 1)
    assert train.labels.tolist() == [0, 1, 2, 3, 4]
    assert train.name(3) == f"{name}/train_images/3"
    assert train.with_channels(4) is train
    with pytest.raises(ConfigError, match="has 4 channels and the model takes 3"):
        train.with_channels(3)
    assert train.fingerprint() == splits["train"].fingerprint() != splits["val"].fingerprint()


@pytest.mark.parametrize("name", WRITERS)
def test_a_single_array_of_any_name_and_number_of_axes(tmp_path: Path, name: str) -> None:
    volumes = np.linspace(0, 1, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    WRITERS[name](tmp_path / name, {"scans": volumes})
    image = open_splits(str(tmp_path / name), Context(spatial_dims=3))["train"].read(1)
    assert (image.shape, image.dtype) == ((3, 4, 5, 1), np.float32)


@pytest.mark.parametrize("name", WRITERS)
def test_what_cannot_be_used(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, {"a": IMAGES, "b": IMAGES})
    with pytest.raises(DataError, match=r"holds a, b; it needs an array named images"):
        open_splits(str(tmp_path / name))
    WRITERS[name](tmp_path / f"2{name}", {"images": IMAGES.astype(np.complex64)})
    with pytest.raises(DataError, match=r"images holds complex64; save integers"):
        open_splits(str(tmp_path / f"2{name}"))


def test_damaged_hdf5(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    (tmp_path / "x.h5").write_bytes(b"no such thing")
    with pytest.raises(DataError, match=r"cannot read .*x.h5: .*; is it a whole file"):
        open_splits(str(tmp_path / "x.h5"))


def test_arrays_that_lie_in_other_files_are_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret").write_bytes(bytes(IMAGES.nbytes))
    with h5py.File(tmp_path / "outside.h5", "w") as file:
        file.create_dataset("images", IMAGES.shape, "u2", external=[(str(tmp_path / "secret"), 0, IMAGES.nbytes)])
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        layout = h5py.VirtualLayout(IMAGES.shape, "u2")
        layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "images", IMAGES.shape)
        file.create_virtual_dataset("images", layout)
    for name in ("outside.h5", "virtual.h5"):
        with pytest.raises(DataError, match=f"{name}/images takes its values from other files; copy them into"):
            open_splits(str(tmp_path / name))


def test_links_out_of_a_file_are_not_followed(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    write_hdf5(tmp_path / "other.h5", {"images": IMAGES})
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["images"] = h5py.ExternalLink("other.h5", "images")
    with pytest.raises(DataError, match="holds no arrays"):
        open_splits(str(tmp_path / "x.h5"))


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    numcodecs = pytest.importorskip("numcodecs")
    group = zarr.open_group(tmp_path / "x.zarr", mode="w", zarr_format=2)
    group.create_array("images", shape=(2, 4, 4), dtype="uint8", filters=[numcodecs.Pickle()])
    with pytest.raises(DataError, match="pickle"):
        open_splits(str(tmp_path / "x.zarr"))


@pytest.mark.parametrize(("name", "module"), [("x.h5", "h5py"), ("x.zarr", "zarr")])
def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    WRITERS[name](tmp_path / name, {"images": IMAGES})
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ConfigError, match=rf"{module} is not installed.*; pip install 'torchmae\[arrays\]'"):
        open_splits(str(tmp_path / name))
