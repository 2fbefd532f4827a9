"""Data sets known by name: scikit-learn's digits, and torchvision's, downloaded when they are not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchmae.data.arrays import ArraySource
from torchmae.data.formats import Context
from torchmae.data.sources import FileSource, Source
from torchmae.errors import DataError
from torchmae.paths import user_path
from torchmae.random import Purpose, permutation

Splits = dict[str, Source]


class Named(NamedTuple):
    """A data set that a name stands for.

    Attributes:
        build: the folder that data sets are kept in -> the splits.
        files: what has to lie in that folder for the set to be used offline.
    """

    build: Callable[[str], Splits]
    files: str


def digits(root: str) -> Splits:
    """scikit-learn's digits: 1797 greyscale images of 8 x 8, part of the installation.

    The values 0 to 16 become 0 to 255. There is no official split: every fifth image of each class, in a fixed
    random order, is "val" (360 images), the rest "train" (1437).
    """
    del root  # nothing to download
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    order = permutation(0, 0, len(images), Purpose.SUBSET)
    by_class = order[np.argsort(data.target[order], kind="stable")]
    is_val = np.zeros(len(images), dtype=bool)
    is_val[by_class[::5]] = True
    classes = [str(digit) for digit in range(10)]
    return {
        split: ArraySource(images[chosen], data.target[chosen], classes, title=title, context=Context(axes="HW"))
        for split, title, chosen in (("train", "digits", ~is_val), ("val", "digits-val", is_val))
    }


def _arrays(dataset: Any, title: str, labels: Any, classes: Sequence[str] | None, channels_last: bool = True) -> Source:
    images = np.asarray(dataset.data)
    axes = "HW" if images.ndim == 3 else "HWC" if channels_last else "CHW"
    return ArraySource(images, labels, classes, title=title, context=Context(axes=axes))


def _train_and_test(class_name: str) -> Callable[[str], Splits]:
    """MNIST's kin and CIFAR: `train=True` and `train=False`, both in memory."""

    def build(root: str) -> Splits:
        from torchvision import datasets

        splits: Splits = {}
        for split in ("train", "test"):
            dataset = getattr(datasets, class_name)(root, train=split == "train", download=True)
            title = class_name.lower() + ("" if split == "train" else "-test")
            splits[split] = _arrays(dataset, title, dataset.targets, dataset.classes)
        return splits

    return build


def _stl10(root: str) -> Splits:
    """All 105,000 training images, of which 100,000 have label -1."""
    from torchvision import datasets

    train = datasets.STL10(root, "train+unlabeled", download=True)
    test = datasets.STL10(root, "test", download=True)
    return {
        "train": _arrays(train, "stl10", train.labels.astype(np.int64), train.classes, channels_last=False),
        "test": _arrays(test, "stl10-test", test.labels.astype(np.int64), test.classes, channels_last=False),
    }


def _svhn(root: str) -> Splits:
    from torchvision import datasets

    sets = {split: datasets.SVHN(root, split, download=True) for split in ("train", "test")}
    names = [str(digit) for digit in range(10)]
    return {
        split: _arrays(item, "svhn" if split == "train" else "svhn-test", item.labels, names, channels_last=False)
        for split, item in sets.items()
    }


def _files(class_name: str, splits: dict[str, str], images: str = "_image_files") -> Callable[[str], Splits]:
    """Sets of image files: torchvision reads the lists of files and labels, we read the images.

    Args:
        class_name: torchvision's class.
        splits: our split to theirs.
        images: the attribute that lists the files; torchvision has no public one.
    """

    def build(root: str) -> Splits:
        from torchvision import datasets

        result: Splits = {}
        for ours, theirs in splits.items():
            dataset = getattr(datasets, class_name)(root, split=theirs, download=True)
            names = [Path(path).relative_to(root).as_posix() for path in getattr(dataset, images)]
            result[ours] = FileSource(Path(root), names, dataset._labels, getattr(dataset, "classes", None))
        return result

    return build


def _eurosat(root: str) -> Splits:
    from torchvision import datasets

    dataset = datasets.EuroSAT(root, download=True)
    names = [Path(path).relative_to(root).as_posix() for path, _ in dataset.samples]
    return {"train": FileSource(Path(root), names, dataset.targets, dataset.classes)}


_IDX = "{train,t10k}-{images-idx3,labels-idx1}-ubyte (unpacked)"

NAMED: dict[str, Named] = {
    "digits": Named(digits, "nothing"),
    "mnist": Named(_train_and_test("MNIST"), f"MNIST/raw/{_IDX}"),
    "fashion_mnist": Named(_train_and_test("FashionMNIST"), f"FashionMNIST/raw/{_IDX}"),
    "kmnist": Named(_train_and_test("KMNIST"), f"KMNIST/raw/{_IDX}"),
    "cifar10": Named(_train_and_test("CIFAR10"), "cifar-10-batches-py/"),
    "cifar100": Named(_train_and_test("CIFAR100"), "cifar-100-python/"),
    "stl10": Named(_stl10, "stl10_binary/"),
    "svhn": Named(_svhn, "train_32x32.mat and test_32x32.mat"),
    "flowers102": Named(
        _files("Flowers102", {"train": "train", "val": "val", "test": "test"}),
        "flowers-102/{jpg/,imagelabels.mat,setid.mat}",
    ),
    "oxford_iiit_pet": Named(
        _files("OxfordIIITPet", {"train": "trainval", "test": "test"}, images="_images"),
        "oxford-iiit-pet/{images,annotations}/",
    ),
    "food101": Named(_files("Food101", {"train": "train", "test": "test"}), "food-101/{images,meta}/"),
    "eurosat": Named(_eurosat, "eurosat/2750/"),
}
"""Every data set that has a name."""


def open_named(name: str, context: Context) -> Splits:
    """The splits of a set in `NAMED`; what is not in the folder `context.root` is downloaded to it, with progress.

    Raises:
        DataError: it is not there and cannot be downloaded; with what to put where.
    """
    named, root = NAMED[name], context.root
    try:
        splits = named.build(str(user_path(root)))
    except (OSError, RuntimeError, ValueError, EOFError) as error:  # URLError is an OSError
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{name} is not in {root}/ and cannot be downloaded ({reason})",
            f"put {named.files} into {root}/, or set data.root to where it lies",
        ) from error
    wanted = context.channels
    return splits if wanted is None else {split: source.with_channels(wanted) for split, source in splits.items()}
