from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from picture_files import rows_of, write_parquet

from torchmae.data.items import Context
from torchmae.data.layouts import folder_splits, list_images, open_splits
from torchmae.errors import DataError


def names_of(folder: Path) -> dict[str, list[str]]:
    splits = folder_splits(folder)
    return {split: [os.path.relpath(item.name(i), folder) for i in range(len(item))] for split, item in splits.items()}


def labels_of(folder: Path) -> dict[str, list[int] | None]:
    return {
        split: None if item.labels is None else item.labels.tolist() for split, item in folder_splits(folder).items()
    }


def test_flat_folder(write_pictures, tmp_path: Path) -> None:
    write_pictures("b.png", "a.JPG", "c.webp", "d.tiff", ".hidden.png", "__MACOSX/a.png", ".git/x.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert names_of(tmp_path) == {"train": ["a.JPG", "b.png", "c.webp", "d.tiff"]}
    assert labels_of(tmp_path) == {"train": None}


def test_class_folders(write_pictures, tmp_path: Path) -> None:
    write_pictures("dog/x/1.png", "cat/1.png", "cat/2.png", "dog/y/2.png")
    source = open_splits(str(tmp_path))["train"]
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.classes == ("cat", "dog")


def test_an_image_outside_the_folders_means_no_classes(write_pictures, tmp_path: Path) -> None:
    write_pictures("dog/1.png", "cat/1.png", "1.png")
    assert labels_of(tmp_path) == {"train": None}


def test_one_folder_is_no_class(write_pictures, tmp_path: Path) -> None:
    write_pictures("images/1.png", "images/2.png")
    assert labels_of(tmp_path) == {"train": None}


@pytest.mark.parametrize(
    ("train", "val"), [("train", "val"), ("Training", "validation"), ("train", "valid"), ("TRAIN", "Val")]
)
def test_split_folders_with_classes(write_pictures, tmp_path: Path, train: str, val: str) -> None:
    write_pictures(f"{train}/cat/1.png", f"{train}/eel/1.png", f"{val}/dog/1.png", f"{val}/eel/1.png", "test/1.png")
    write_pictures("extra/not_used.png")
    splits = folder_splits(tmp_path)
    assert {split: len(item) for split, item in splits.items()} == {"train": 2, "val": 2, "test": 1}
    assert (splits["train"].classes, splits["val"].classes) == (("cat", "eel"), ("cat", "eel", "dog"))
    assert labels_of(tmp_path) == {"train": [0, 1], "val": [2, 1], "test": None}


def test_without_a_train_folder_test_is_a_class_like_any_other(write_pictures, tmp_path: Path) -> None:
    write_pictures("test/1.png", "probe/1.png")
    assert labels_of(tmp_path) == {"train": [0, 1]}


def test_a_train_folder_without_images_is_no_split(write_pictures, tmp_path: Path) -> None:
    write_pictures("pictures/1.png", "test/1.png")
    (tmp_path / "train").mkdir()
    assert list(names_of(tmp_path)) == ["train"]


def test_links_are_followed_and_loops_are_not(write_pictures, tmp_path: Path) -> None:
    write_pictures("data/a/1.png", "elsewhere/2.png")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "elsewhere")  # the same folder again
    assert list(list_images(tmp_path / "data", (".png",)).names) == [b"a/1.png", b"b/2.png"]


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is empty; accepted are .jpg"):
        folder_splits(tmp_path)
    for name in ("a.pdf", "b.pdf", "c.txt", "LICENSE"):
        (tmp_path / name).touch()
    expected = r"holds no images, only 4 other files \(2 .pdf, 1 without suffix, 1 .txt\); accepted are .jpg"
    with pytest.raises(DataError, match=expected):
        folder_splits(tmp_path)


def test_a_folder_that_may_not_be_read(write_pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures("a/1.png", "b/1.png")
    scandir = os.scandir

    def refuse(path: bytes) -> object:
        if path.endswith(b"/b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    source = folder_splits(tmp_path)["train"]
    assert len(source) == 1
    assert "folder b cannot be read (Permission denied) and is passed over" in source.remarks
    with pytest.raises(DataError, match=r"cannot read folder .*b: Permission denied"):
        folder_splits(tmp_path / "b")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar01", "'cifar01' is neither a path nor the name of a data set; did you mean 'cifar10'"),
        ("qqqq", "'qqqq' is neither a path nor the name of a data set; names are cifar10, "),
        ("./gone", "no such file or folder: gone"),
        ("gone.npy", "no such file or folder: gone.npy"),
    ],
)
def test_nothing_there(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_splits(spec)


def test_single_files_that_are_no_data_set(write_pictures, tmp_path: Path) -> None:
    (path,) = write_pictures("a.png")
    with pytest.raises(DataError, match=rf"a single file of type .png; give its folder: {tmp_path}"):
        open_splits(str(path))
    (tmp_path / "a.zip").touch()
    with pytest.raises(DataError, match="unpack archives first"):
        open_splits(str(tmp_path / "a.zip"))


def test_channels_are_handed_on(write_pictures, tmp_path: Path) -> None:
    write_pictures("train/a.png", "val/b.png")
    splits = open_splits(str(tmp_path), Context(num_channels=1))
    assert [item.read(0).shape[-1] for item in splits.values()] == [1, 1]


def test_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 8, 6), np.uint8))
    splits = open_splits(str(tmp_path / "x.npy"))
    assert list(splits) == ["train"]
    assert splits["train"].read(0).shape == (8, 6, 1)
    assert open_splits(str(tmp_path / "x.npy"), Context(spatial_dims=1))["train"].read(0).shape == (8, 6)


def test_npz_with_and_without_splits(tmp_path: Path) -> None:
    images, labels = np.zeros((3, 8, 6), np.uint8), np.array([[2], [1], [0]])
    np.savez(tmp_path / "one.npz", images=images, labels=labels)
    one = open_splits(str(tmp_path / "one.npz"))
    assert one["train"].labels.tolist() == [2, 1, 0]
    np.savez(tmp_path / "medical.npz", train_images=images, train_labels=labels, val_images=images[:1])
    medical = open_splits(str(tmp_path / "medical.npz"))
    assert {split: len(item) for split, item in medical.items()} == {"train": 3, "val": 1}
    assert medical["val"].labels is None


def test_npz_that_cannot_be_used(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros(3))
    with pytest.raises(DataError, match=r"x.npz/x has shape \(3,\)"):
        open_splits(str(tmp_path / "x.npz"))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:50])
    with pytest.raises(DataError, match=r"cannot read .*cut.npz"):
        open_splits(str(tmp_path / "cut.npz"))


def test_parquet_file_and_folders(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for i, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test")):
        write_parquet(tmp_path / "data" / f"{name}.parquet", rows_of(3, seed=10 * i))
    (tmp_path / "README.md").touch()
    splits = open_splits(str(tmp_path))
    assert {split: len(item) for split, item in splits.items()} == {"train": 6, "val": 3, "test": 3}
    single = open_splits(str(tmp_path / "data" / "test.parquet"))
    assert {split: len(item) for split, item in single.items()} == {"train": 3}
    for path in tmp_path.glob("data/train*"):
        path.rename(path.with_name(path.name.replace("train", "part")))
    assert {split: len(item) for split, item in open_splits(str(tmp_path)).items()} == {"train": 12}


def test_the_shared_cifar10(shared_data: Path) -> None:
    pytest.importorskip("pyarrow")
    splits = open_splits(str(shared_data / "cifar10"))
    assert {split: len(item) for split, item in splits.items()} == {"train": 50000, "test": 10000}
    assert splits["train"].read(49999).shape == (32, 32, 3)
    assert splits["train"].classes[:2] == ("airplane", "automobile")
    assert np.bincount(splits["test"].labels).tolist() == [1000] * 10


def test_folders_called_by_number_are_in_the_order_of_the_numbers(write_pictures, tmp_path: Path) -> None:
    write_pictures(*(f"{number}/1.png" for number in (0, 1, 2, 10)))
    assert folder_splits(tmp_path)["train"].classes == ("0", "1", "2", "10")
