from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from torchmae.data import layouts
from torchmae.data.items import Context
from torchmae.data.layouts import open_splits
from torchmae.errors import DataError


def test_digits() -> None:
    splits = open_splits("digits")
    train, val = splits["train"], splits["val"]
    assert (len(train), len(val)) == (1437, 360)
    assert train.classes == tuple("0123456789")
    both = np.stack([item.read(i) for item in (train, val) for i in range(len(item))])
    assert both.shape == (1797, 8, 8, 1)
    assert both.dtype == np.uint8
    assert (both.min(), both.max()) == (0, 255)
    pixels = sorted(image.tobytes() for image in both)
    assert pixels == sorted(np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in load_digits().images)
    shares = np.bincount(val.labels) / np.bincount(np.concatenate([train.labels, val.labels]))
    assert np.abs(shares - 0.2).max() < 0.01
    assert (train.name(17), val.name(0)) == ("digits/17", "digits-val/0")


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.mark.parametrize(
    ("name", "folder"), [("fashion_mnist", "FashionMNIST"), ("mnist", "MNIST"), ("kmnist", "KMNIST")]
)
def test_idx_files_that_are_there_are_used(name: str, folder: str, tmp_path: Path) -> None:
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    for prefix, count in (("train", 7), ("t10k", 3)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images[:count])
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8))
    splits = open_splits(name, Context(root=str(tmp_path)))
    assert {split: len(item) for split, item in splits.items()} == {"train": 7, "test": 3}
    np.testing.assert_array_equal(splits["train"].read(5)[..., 0], images[5])
    assert splits["train"].labels.tolist() == list(range(7))
    assert len(splits["train"].classes) == 10


def test_stl10_trains_on_the_unlabelled_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import STL10

    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 96, 96), dtype=np.uint8)
    images[:2].tofile(folder / "train_X.bin")
    images[2:5].tofile(folder / "unlabeled_X.bin")
    images[5:].tofile(folder / "test_X.bin")
    np.array([1, 2], np.uint8).tofile(folder / "train_y.bin")
    np.array([3], np.uint8).tofile(folder / "test_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    splits = open_splits("stl10", Context(root=str(tmp_path)))
    assert splits["train"].labels.tolist() == [0, 1, -1, -1, -1]
    assert splits["test"].labels.tolist() == [2]
    assert splits["train"].read(0).shape == (96, 96, 3)
    # The files hold columns first, which torchvision undoes.
    np.testing.assert_array_equal(splits["train"].read(4), images[4].transpose(2, 1, 0))


def test_cifar100_and_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat
    from torchvision import datasets

    for name in ("CIFAR100", "SVHN"):
        monkeypatch.setattr(getattr(datasets, name), "_check_integrity", lambda self: True)
        monkeypatch.setattr(getattr(datasets, name), "download", lambda self: None)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for split in ("train", "test"):
        entry = {"data": images.transpose(0, 3, 1, 2).reshape(4, -1), "fine_labels": [1, 0, 1, 0]}
        (folder / split).write_bytes(pickle.dumps(entry))
        savemat(
            tmp_path / f"{split}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": np.array([[10], [1], [2], [3]])}
        )
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "bee"]}))
    cifar = open_splits("cifar100", Context(root=str(tmp_path)))["train"]
    np.testing.assert_array_equal(cifar.read(3), images[3])
    assert (cifar.labels.tolist(), cifar.classes) == ([1, 0, 1, 0], ("apple", "bee"))
    svhn = open_splits("svhn", Context(root=str(tmp_path)))["test"]
    np.testing.assert_array_equal(svhn.read(2), images[2])
    assert svhn.labels.tolist() == [0, 1, 2, 3]


def test_sets_of_files(write_pictures, tmp_path: Path) -> None:
    write_pictures(*(f"food-101/images/{name}.jpg" for name in ("pie/1", "pie/2", "rice/3")))
    meta = tmp_path / "food-101" / "meta"
    meta.mkdir()
    (meta / "train.json").write_text('{"pie": ["pie/1", "pie/2"], "rice": []}')
    (meta / "test.json").write_text('{"pie": [], "rice": ["rice/3"]}')
    food = open_splits("food101", Context(root=str(tmp_path)))
    assert food["train"].labels.tolist() == [0, 0]
    assert food["test"].labels.tolist() == [1]
    assert food["test"].classes == ("pie", "rice")
    assert food["test"].read(0).shape == (12, 16, 3)

    write_pictures("eurosat/2750/Forest/1.jpg", "eurosat/2750/River/1.jpg")
    eurosat = open_splits("eurosat", Context(root=str(tmp_path)))
    assert {split: item.labels.tolist() for split, item in eurosat.items()} == {"train": [0, 1]}

    write_pictures("oxford-iiit-pet/images/Abyssinian_1.jpg", "oxford-iiit-pet/images/beagle_2.jpg")
    lists = tmp_path / "oxford-iiit-pet" / "annotations"
    lists.mkdir()
    (lists / "trainval.txt").write_text("Abyssinian_1 1 1 1\n")
    (lists / "test.txt").write_text("beagle_2 2 2 1\n")
    pets = open_splits("oxford_iiit_pet", Context(root=str(tmp_path)))
    assert [pets[split].labels.tolist() for split in ("train", "test")] == [[0], [1]]
    assert pets["test"].read(0).shape == (12, 16, 3)


def test_flowers(write_pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat
    from torchvision.datasets import Flowers102

    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    monkeypatch.setattr(Flowers102, "download", lambda self: None)
    folder = tmp_path / "flowers-102"
    write_pictures(*(f"flowers-102/jpg/image_{i:05d}.jpg" for i in range(1, 7)))
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 1, 2, 1, 2]])})
    savemat(
        folder / "setid.mat", {"trnid": np.array([[1, 2]]), "valid": np.array([[3, 4]]), "tstid": np.array([[5, 6]])}
    )
    flowers = open_splits("flowers102", Context(root=str(tmp_path)))
    assert {split: item.labels.tolist() for split, item in flowers.items()} == {
        "train": [0, 1],
        "val": [0, 1],
        "test": [0, 1],
    }
    assert flowers["val"].name(0).endswith("image_00003.jpg")


@pytest.mark.parametrize("name", sorted(set(layouts.NAMED) - {"digits"}))
def test_offline_says_what_to_put_where(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(DataError) as caught:
        open_splits(name, Context(root=str(tmp_path / "sets")))
    message = str(caught.value)
    assert message.startswith(f"{name} is not in {tmp_path}/sets/ and cannot be downloaded (")
    assert f"put {layouts.NAMED[name].files} into {tmp_path}/sets/, or set data.root" in message
    assert "\n" not in message


def test_a_home_folder_is_expanded(write_pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_pictures("eurosat/2750/Forest/1.jpg")
    assert len(open_splits("eurosat", Context(root="~"))["train"]) == 1
    Image.open(open_splits("eurosat", Context(root="~"))["train"].name(0)).close()
