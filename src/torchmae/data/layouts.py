"""What the user points at, a folder, a file or a name, to the splits it holds."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

import numpy as np

from torchmae.data.decode import IMAGE_SUFFIXES, check_channels
from torchmae.data.named import NAMED, open_named
from torchmae.data.sources import ArraySource, FileSource, ParquetSource, Source, map_array
from torchmae.errors import DataError

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
"""Folder (or parquet file) names that mean a split, in lower case; case does not matter."""

_ACCEPTED = f"accepted are {', '.join(IMAGE_SUFFIXES)}, or a .npy, .npz or .parquet file"


def open_splits(
    spec: str, root: str, channels: int | None = None, spatial_dims: int | None = None
) -> dict[str, Source]:
    """Opens a data set.

    Args:
        spec: a name ("digits", or one of torchvision's sets), or the path of a folder of images, of a folder of
            parquet files, or of a .npy, .npz or .parquet file. A name wins over a folder of that name: write
            "./cifar10" for the folder.
        root: where torchvision's sets are kept and downloaded to.
        channels: 1 or 3 for image files; None: what each file has.
        spatial_dims: how many axes of an array are spatial, as in `ArraySource`.

    Returns:
        split name to source; always "train", and "val" and "test" where the data has them.

    Raises:
        DataError: nothing there, or nothing that can be used.
    """
    if spec in NAMED:
        splits = open_named(spec, root)
        return splits if channels is None else {name: item.with_channels(channels) for name, item in splits.items()}
    path = Path(spec).expanduser()
    if path.is_dir():
        return folder_splits(path, channels)
    if not path.is_file():
        raise _unknown(spec, path)
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return {"train": ArraySource(map_array(path), title=path.name, spatial_dims=spatial_dims, file=path)}
    if suffix == ".npz":
        return npz_splits(path, spatial_dims)
    if suffix == ".parquet":
        return {"train": ParquetSource([path], channels)}
    hint = f"give its folder: {path.parent}" if suffix in IMAGE_SUFFIXES else "unpack archives first; " + _ACCEPTED
    raise DataError(f"{path} is a single file of type {suffix or '(none)'}", hint)


def _unknown(spec: str, path: Path) -> DataError:
    if path.name != spec or path.suffix:
        return DataError(f"no such file or folder: {path}", "check data.source")
    near = get_close_matches(spec, NAMED, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return DataError(
        f"{spec!r} is neither a path nor the name of a data set", f"{hint}names are {', '.join(sorted(NAMED))}"
    )


def folder_splits(folder: Path, channels: int | None = None) -> dict[str, Source]:
    """The splits of a folder of images, nested or flat.

    A folder that holds train (or training) with images is read as splits: that one, val (or valid, validation) and
    test; what lies beside them is not used. Any other folder is all training data.

    Sub-folders are classes where every image of a split lies in one and there are two or more: the label is the
    first folder under the split. Shards (00/, 01/, ...) look the same and become classes too, which matters to
    nobody but the kNN figure. Hidden files are passed over, links to folders followed, each folder read once.

    Args:
        folder: an existing folder.
        channels: 1 or 3; None: what each file has.

    Raises:
        DataError: no images in it; what was there instead.
    """
    check_channels(channels)
    names, others = list_images(folder)
    if not names and others[".parquet"]:
        return parquet_splits(folder, channels)
    if not names:
        most = sorted(others.items(), key=lambda item: (-item[1], item[0]))[:5]
        seen = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in most)
        found = f"holds no images, only {others.total()} other files ({seen})" if others else "is empty"
        raise DataError(f"{folder} {found}", _ACCEPTED)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        top = PurePosixPath(name).parts[0] if "/" in name else ""
        groups[SPLIT_FOLDERS.get(top.lower(), "")].append(name)
    if "train" not in groups:
        groups = {"train": names}
        depth = 0
    else:
        groups.pop("", None)
        depth = 1
    of_image = {split: _class_names(members, depth) for split, members in groups.items()}
    classes = sorted({name for members in of_image.values() for name in members or ()})
    number = {name: i for i, name in enumerate(classes)}
    splits: dict[str, Source] = {}
    for split, members in groups.items():
        labelled = of_image[split] if len(classes) > 1 else None
        labels = None if labelled is None else np.array([number[name] for name in labelled])
        splits[split] = FileSource(folder, members, labels, None if labels is None else classes, channels)
    return splits


def _class_names(names: Sequence[str], depth: int) -> list[str] | None:
    """The folder at `depth` of each path; None unless every path has one there."""
    parts = [PurePosixPath(name).parts for name in names]
    return [part[depth] for part in parts] if all(len(part) > depth + 1 for part in parts) else None


def list_images(folder: Path) -> tuple[list[str], Counter[str]]:
    """The image files under a folder.

    Returns:
        their paths relative to `folder`, with "/", sorted; and how many other files there are of each suffix.
    """
    images: list[str] = []
    others: Counter[str] = Counter()
    visited: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        status = os.stat(place)  # noqa: PTH116 (os.walk gives strings, and a Path for each folder of a million is slow)
        if (status.st_dev, status.st_ino) in visited:  # a link back up, or a second link to the same folder
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        prefix = os.path.relpath(place, folder).replace(os.sep, "/")
        for file in files:
            if file.startswith("."):
                continue
            suffix = os.path.splitext(file)[1].lower()  # noqa: PTH122 (as above)
            if suffix in IMAGE_SUFFIXES:
                images.append(file if prefix == "." else f"{prefix}/{file}")
            else:
                others[suffix] += 1
    return sorted(images), others


def _refuse(error: OSError) -> None:
    raise DataError(f"cannot read folder {error.filename}: {error.strerror}", "mend its permissions, or move it away")


def parquet_splits(folder: Path, channels: int | None = None) -> dict[str, Source]:
    """The splits of a folder of parquet files: train*.parquet, validation*.parquet, test*.parquet, at any depth.

    Files whose names begin with no split are all training data, unless there are train files too.
    """
    groups: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(folder.rglob("*.parquet")):
        first_word = file.stem.lower().replace("_", "-").partition("-")[0]
        groups[SPLIT_FOLDERS.get(first_word, "")].append(file)
    if "train" not in groups:
        groups = {"train": [file for files in groups.values() for file in files]}
    groups.pop("", None)
    return {split: ParquetSource(files, channels) for split, files in groups.items()}


def npz_splits(path: Path, spatial_dims: int | None = None) -> dict[str, Source]:
    """The splits of an .npz file: arrays `images` and `labels`, or train_images, val_images, test_images and so on."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            held = {name: arrays[name] for name in arrays.files if name.endswith(("images", "labels"))}
            names = ", ".join(arrays.files)
    except Exception as error:  # a damaged zip file fails as zlib, struct, zipfile or NumPy see fit
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())}", "save it with numpy.savez") from error
    splits: dict[str, Source] = {}
    for prefix, split in (("", "train"), ("train_", "train"), ("val_", "val"), ("test_", "test")):
        if f"{prefix}images" in held:
            splits[split] = ArraySource(
                held[f"{prefix}images"],
                held.get(f"{prefix}labels"),
                title=f"{path.name}/{prefix}images",
                spatial_dims=spatial_dims,
            )
    if "train" not in splits:
        raise DataError(f"{path} holds {names or 'nothing'}", "it needs an array named images (and may have labels)")
    return splits
