"""Data sets known by name: scikit-learn's digits, and torchvision's, downloaded when they are not there."""

from __future__ import annotations

from collections.abc import Callable
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


def _torchvision(class_name: str, **options: dict[str, object]) -> Callable[[Path], Splits]:
    """What builds a data set of torchvision: its class, and the options that stand for each split."""

    def build(root: Path) -> Splits:
        from torchvision import datasets

        splits: Splits = {}
        for split, given in options.items():
            dataset = getattr(datasets, class_name)(str(root), download=True, **given)
            splits[split] = _source(dataset, class_name.lower() + ("" if split == "train" else "-test"), root)
        return splits

    return build


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


_BY_TRAIN: dict[str, dict[str, object]] = {"train": {"train": True}, "test": {"train": False}}
_BY_SPLIT: dict[str, dict[str, object]] = {"train": {"split": "train"}, "test": {"split": "test"}}
_IDX = "{train,t10k}-{images-idx3,labels-idx1}-ubyte (unpacked)"

NAMED: dict[str, Named] = {
    "digits": Named(digits, "nothing"),
    "mnist": Named(_torchvision("MNIST", **_BY_TRAIN), f"MNIST/raw/{_IDX}"),
    "fashion_mnist": Named(_torchvision("FashionMNIST", **_BY_TRAIN), f"FashionMNIST/raw/{_IDX}"),
    "kmnist": Named(_torchvision("KMNIST", **_BY_TRAIN), f"KMNIST/raw/{_IDX}"),
    "cifar10": Named(_torchvision("CIFAR10", **_BY_TRAIN), "cifar-10-batches-py/"),
    "cifar100": Named(_torchvision("CIFAR100", **_BY_TRAIN), "cifar-100-python/"),
    "stl10": Named(  # 105,000 training images, of which 100,000 have the label -1
        _torchvision("STL10", train={"split": "train+unlabeled"}, test={"split": "test"}), "stl10_binary/"
    ),
    "svhn": Named(_torchvision("SVHN", **_BY_SPLIT), "train_32x32.mat and test_32x32.mat"),
    "flowers102": Named(
        _torchvision("Flowers102", train={"split": "train"}, val={"split": "val"}, test={"split": "test"}),
        "flowers-102/{jpg/,imagelabels.mat,setid.mat}",
    ),
    "oxford_iiit_pet": Named(
        _torchvision("OxfordIIITPet", train={"split": "trainval"}, test={"split": "test"}),
        "oxford-iiit-pet/{images,annotations}/",
    ),
    "food101": Named(_torchvision("Food101", **_BY_SPLIT), "food-101/{images,meta}/"),
    "eurosat": Named(_torchvision("EuroSAT", train={}), "eurosat/2750/"),
}


def open_named(name: str, context: Context) -> Splits:
    """The splits of a set in `NAMED`; what is not in the folder `context.root` is downloaded to it, with progress.

    Raises:
        DataError: it is not there and cannot be downloaded; with what to put where.
    """
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
