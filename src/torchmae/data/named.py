"""Data sets known by name: scikit-learn's digits, and torchvision's, downloaded when they are not there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchmae.data.arrays import ArraySource
from torchmae.data.formats import Context
from torchmae.data.sources import FileSource, Source
from torchmae.errors import DataError, reason_of
from torchmae.paths import user_path
from torchmae.random import Purpose, permutation

Splits = dict[str, Source]

_DIGITS = tuple("0123456789")


class Named(NamedTuple):
    """A data set that a name stands for."""

    build: Callable[[Path], Splits]  # from the folder that data sets are kept in
    files: str  # what has to lie in that folder for the set to be used offline


def digits(root: Path) -> Splits:
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
    return {
        split: ArraySource(images[chosen], data.target[chosen], _DIGITS, title=title, context=Context(axes="HW"))
        for split, title, chosen in (("train", "digits", ~is_val), ("val", "digits-val", is_val))
    }


def _torchvision(class_name: str, option: str, values: dict[str, object], root: Path) -> Splits:
    """A data set of torchvision; `values` are those of the option of its class that stand for each split."""
    from torchvision import datasets

    splits: Splits = {}
    for split, value in values.items():
        dataset = getattr(datasets, class_name)(str(root), download=True, **{option: value})
        splits[split] = _source(dataset, class_name.lower() + ("" if split == "train" else "-test"), root)
    return splits


def _source(dataset: Any, title: str, root: Path) -> Source:
    """The images of a data set in memory, or the files that it lists, for which torchvision has no public name."""

    def first_of(*names: str) -> Any:
        return next((getattr(dataset, name) for name in names if hasattr(dataset, name)), None)

    labels, classes = first_of("targets", "labels", "_labels"), first_of("classes")
    if hasattr(dataset, "data"):
        images = np.asarray(dataset.data)
        axes = "HW" if images.ndim == 3 else "CHW" if images.shape[1] == 3 else "HWC"
        return ArraySource(images, labels, classes or _DIGITS, title=title, context=Context(axes=axes))
    paths = first_of("_image_files", "_images") or [path for path, _ in dataset.samples]
    return FileSource(root, [Path(path).relative_to(root).as_posix() for path in paths], labels, classes)


_TRAIN: dict[str, object] = {"train": True, "test": False}
_SPLIT: dict[str, object] = {"train": "train", "test": "test"}
_IDX = "{train,t10k}-{images-idx3,labels-idx1}-ubyte (unpacked)"

NAMED: dict[str, Named] = {
    "digits": Named(digits, "nothing"),
    "mnist": Named(partial(_torchvision, "MNIST", "train", _TRAIN), f"MNIST/raw/{_IDX}"),
    "fashion_mnist": Named(partial(_torchvision, "FashionMNIST", "train", _TRAIN), f"FashionMNIST/raw/{_IDX}"),
    "kmnist": Named(partial(_torchvision, "KMNIST", "train", _TRAIN), f"KMNIST/raw/{_IDX}"),
    "cifar10": Named(partial(_torchvision, "CIFAR10", "train", _TRAIN), "cifar-10-batches-py/"),
    "cifar100": Named(partial(_torchvision, "CIFAR100", "train", _TRAIN), "cifar-100-python/"),
    # 105,000 training images, of which 100,000 have the label -1
    "stl10": Named(
        partial(_torchvision, "STL10", "split", {"train": "train+unlabeled", "test": "test"}), "stl10_binary/"
    ),
    "svhn": Named(partial(_torchvision, "SVHN", "split", _SPLIT), "train_32x32.mat and test_32x32.mat"),
    "flowers102": Named(
        partial(_torchvision, "Flowers102", "split", {"train": "train", "val": "val", "test": "test"}),
        "flowers-102/{jpg/,imagelabels.mat,setid.mat}",
    ),
    "oxford_iiit_pet": Named(
        partial(_torchvision, "OxfordIIITPet", "split", {"train": "trainval", "test": "test"}),
        "oxford-iiit-pet/{images,annotations}/",
    ),
    "food101": Named(partial(_torchvision, "Food101", "split", _SPLIT), "food-101/{images,meta}/"),
    "eurosat": Named(partial(_torchvision, "EuroSAT", "transform", {"train": None}), "eurosat/2750/"),  # has no splits
}


def open_named(name: str, context: Context) -> Splits:
    """The splits of a set in `NAMED`, downloaded to the folder `context.root` if not there; DataError if that fails."""
    named, root = NAMED[name], context.root
    try:
        splits = named.build(user_path(root))
    except (OSError, RuntimeError, ValueError, EOFError) as error:  # URLError is an OSError
        raise DataError(
            f"{name} is not in {root}/ and cannot be downloaded ({reason_of(error)})",
            f"put {named.files} into {root}/, or set data.root to where it lies",
        ) from error
    channels = context.channels
    return splits if channels is None else {split: source.with_channels(channels) for split, source in splits.items()}
