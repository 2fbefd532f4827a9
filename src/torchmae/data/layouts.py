"""Opens the splits of a data source: a folder, a file, a pattern, a URL, or the name of a data set."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchmae.config.pretrain import OWN
from torchmae.data.arrays import (
    HDF5_SUFFIXES,
    PREFIXES,
    ZARR_SUFFIX,
    ArraySource,
    FileArray,
    named_arrays,
    npz_splits,
    stored_splits,
)
from torchmae.data.folders import LIST_SUFFIXES, Listing, list_images, picture_splits, shortened, split_named
from torchmae.data.formats import FORMATS, picture_suffixes
from torchmae.data.groups import name_groups
from torchmae.data.items import Context
from torchmae.data.lists import list_splits, matching, pattern_source
from torchmae.data.reading import FEW
from torchmae.data.remote import Place, expand_url, is_url, last_name, shown
from torchmae.data.shards import CLASSES_FILE, ShardSource
from torchmae.data.sources import FileSource, Source, each_page, evenly_spaced
from torchmae.data.tables import HUB_PREFIX, ParquetSource, hub_splits
from torchmae.errors import ConfigError, DataError, reason_of
from torchmae.paths import user_path
from torchmae.random import Purpose, permutation

_DIGITS = tuple("0123456789")


class Named(NamedTuple):
    """A data set with a name."""

    build: Callable[[Path], dict[str, Source]]  # opens it in the folder of data sets
    files: str  # the files that this folder must have for use without a network


def digits(root: Path) -> dict[str, Source]:
    """scikit-learn's digits: 1797 greyscale images of 8 x 8, installed with it; values 0 to 16 become 0 to 255.

    Every fifth image of each class, in a fixed random order, is in "val" (360); the other 1437 are in "train".
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


def _torchvision(class_name: str, option: str, values: dict[str, object], files: str) -> Named:
    """A data set of torchvision; `option` is the argument that chooses a split, `values` its value for each split."""

    def build(root: Path) -> dict[str, Source]:
        from torchvision import datasets

        splits: dict[str, Source] = {}
        for split, value in values.items():
            dataset = getattr(datasets, class_name)(str(root), download=True, **{option: value})
            splits[split] = _source(dataset, class_name.lower() + ("" if split == "train" else "-test"), root)
        return splits

    return Named(build, files)


def _source(dataset: Any, title: str, root: Path) -> Source:
    """The images of a torchvision data set, from its array, or from its list of files, whose attribute is private."""

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
SPLITS = ("train", "val", "test")
_SPLIT: dict[str, object] = {"train": "train", "test": "test"}
_IDX = "{train,t10k}-{images-idx3,labels-idx1}-ubyte (unpacked)"

NAMED: dict[str, Named] = {
    "digits": Named(digits, "nothing"),
    "mnist": _torchvision("MNIST", "train", _TRAIN, f"MNIST/raw/{_IDX}"),
    "fashion_mnist": _torchvision("FashionMNIST", "train", _TRAIN, f"FashionMNIST/raw/{_IDX}"),
    "kmnist": _torchvision("KMNIST", "train", _TRAIN, f"KMNIST/raw/{_IDX}"),
    "cifar10": _torchvision("CIFAR10", "train", _TRAIN, "cifar-10-batches-py/"),
    "cifar100": _torchvision("CIFAR100", "train", _TRAIN, "cifar-100-python/"),
    # 105,000 training images, of which 100,000 have the label -1
    "stl10": _torchvision("STL10", "split", {"train": "train+unlabeled", "test": "test"}, "stl10_binary/"),
    "svhn": _torchvision("SVHN", "split", _SPLIT, "train_32x32.mat and test_32x32.mat"),
    "flowers102": _torchvision(
        "Flowers102", "split", {name: name for name in SPLITS}, "flowers-102/{jpg/,imagelabels.mat,setid.mat}"
    ),
    "oxford_iiit_pet": _torchvision(
        "OxfordIIITPet", "split", {"train": "trainval", "test": "test"}, "oxford-iiit-pet/{images,annotations}/"
    ),
    "food101": _torchvision("Food101", "split", _SPLIT, "food-101/{images,meta}/"),
    "eurosat": _torchvision("EuroSAT", "transform", {"train": None}, "eurosat/2750/"),  # has no splits
}


def open_named(name: str, context: Context) -> dict[str, Source]:
    """The splits of a set in `NAMED`, in the folder `context.root`; DataError: not there, and the download failed."""
    named, root = NAMED[name], context.root
    for option, given in (("channels", context.channels), ("nodata", isinstance(context.nodata, float))):
        if given:
            raise ConfigError(f"data.{option} is given and {name} has 8-bit pictures alone", f"leave data.{option} out")
    try:
        splits = named.build(user_path(root))
    except (OSError, RuntimeError, ValueError, EOFError) as error:  # URLError is an OSError
        problem = f"{name} is not in {root}/ and cannot be downloaded ({reason_of(error)})"
        raise DataError(problem, f"put {named.files} into {root}/, or set data.root to where it lies") from error
    channels = context.num_channels
    return splits if channels is None else {split: source.with_channels(channels) for split, source in splits.items()}


def _accepted() -> str:
    data_sets = ", ".join(suffix for layout in LAYOUTS.values() for suffix in layout.suffixes)
    return f"accepted are {', '.join(picture_suffixes())}, or {data_sets}"


def open_splits(spec: str, context: Context = Context()) -> dict[str, Source]:
    """Opens a data source: a source for each split, always "train", and "val" and "test" where the data has them.

    `spec` is a name in `NAMED`; the path of a folder (of images, or of parquet, tar or .npy files) or of a single file;
    a pattern of paths ("photos/**/*.jpg"); the URL of a file, also with {000..099} or *; or hf:NAME for the Hugging
    Face `datasets` library. For a folder with the name of a data set, write "./cifar10". DataError: nothing there, or
    nothing that can be used.
    """
    if spec == OWN:
        raise ConfigError("data.source is 'own', an object handed over in Python", "hand it over: source=SOURCE")
    if not spec:
        raise ConfigError("data.source is empty", "give a folder, a file, or a name such as digits")
    context = settled(spec, context)
    layout = next((layout for layout in LAYOUTS.values() if layout.fits(spec)), None)
    if layout is None:
        raise _unknown(spec, user_path(spec))
    splits = layout.open(spec, context)
    if context.spatial_dims == 3 and not FORMATS["dicom"].missing():
        from torchmae.data.dicom import by_series

        splits = {split: by_series(source) for split, source in splits.items()}
    if context.pages == "all":
        splits = {split: each_page(source, context.progress) for split, source in splits.items()}
    name_groups(splits, context.group)
    return splits


def settled(spec: str, context: Context) -> Context:
    """The context with the numbers that data.spacing "median" means."""
    if context.spacing != "median":
        return context
    native = open_splits(spec, replace(context, spacing="native", clip=None))["train"]
    return replace(context, spacing=median_spacing(native))


def median_spacing(source: Source) -> float | tuple[float, ...]:
    """The median over samples of what `data.spacing` sets; DataError: none of them says it."""
    metas = []
    for index in evenly_spaced(len(source), FEW):
        with suppress(DataError):
            metas.append(source.open(int(index)).meta)
    for pace in ("rate", "fps"):
        if found := [meta[pace] for meta in metas if pace in meta]:
            return float(np.median(found))
    each = [meta["spacing"] for meta in metas if "spacing" in meta]
    if not each or len(set(map(len, each))) > 1:
        raise DataError("data.spacing is 'median', and the images do not say their spacing", "leave it out")
    return tuple(float(f"{length:.6g}") for length in np.median(each, axis=0))


class Layout(NamedTuple):
    """A kind of data source."""

    fits: Callable[[str], bool]  # whether the user's `spec` is of this kind
    open: Callable[[str, Context], dict[str, Source]]  # opens the splits
    suffixes: tuple[str, ...] = ()  # of the files of this kind


def file_layout(suffixes: tuple[str, ...], opener: Callable[[Path, Context], dict[str, Source]]) -> Layout:
    """The layout of single files, with these suffixes in lower case, each of which is a data set."""

    def fits(spec: str) -> bool:
        path = user_path(spec)
        return path.suffix.lower() in suffixes and path.exists() and path.is_dir() == (suffixes == (ZARR_SUFFIX,))

    return Layout(fits, lambda spec, context: opener(user_path(spec), context), suffixes)


def _open_array(path: Path, context: Context) -> dict[str, Source]:
    return {"train": ArraySource(FileArray(path), title=path.name, context=context)}


def _refuse_file(spec: str, context: Context) -> dict[str, Source]:
    del context
    path = user_path(spec)
    suffix = path.suffix.lower()
    hint = (
        f"give its folder: {path.parent}" if suffix in picture_suffixes() else f"unpack archives first; {_accepted()}"
    )
    raise DataError(f"{path} is a single file of type {suffix or '(none)'}", hint)


_Opener = Callable[[Sequence[Place], Context], Source]
_TABLES: dict[str, _Opener] = {".parquet": ParquetSource, ".tar": ShardSource}  # many such files form one data set

LAYOUTS: dict[str, Layout] = {
    "named": Layout(lambda spec: spec in NAMED, open_named),
    "hub": Layout(
        lambda spec: spec.startswith(HUB_PREFIX),
        lambda spec, context: hub_splits(spec.removeprefix(HUB_PREFIX), context),
    ),
    "url": Layout(is_url, lambda spec, context: _open_files(spec, expand_url(spec), context)),
    "zarr": file_layout((ZARR_SUFFIX,), stored_splits),
    "folder": Layout(
        lambda spec: user_path(spec).is_dir(),
        lambda spec, context: folder_splits(user_path(spec), context),
    ),
    "npy": file_layout((".npy",), _open_array),
    "npz": file_layout((".npz",), npz_splits),
    "hdf5": file_layout(HDF5_SUFFIXES, stored_splits),
    "parquet": file_layout((".parquet",), lambda path, context: {"train": ParquetSource([path], context)}),
    "tar": file_layout((".tar",), lambda path, context: {"train": ShardSource([path], context)}),
    "list": file_layout(LIST_SUFFIXES, list_splits),
    "file": Layout(lambda spec: user_path(spec).is_file(), _refuse_file),
    "pattern": Layout(
        lambda spec: any(sign in spec for sign in "*?[{"),
        lambda spec, context: _open_files(spec, matching(spec), context),
    ),
}
"""The kinds of data sources; the first row that fits opens the source. A new row works in every command."""


def _open_files(spec: str, files: Sequence[Place], context: Context) -> dict[str, Source]:
    """The splits of the files of a pattern or a URL: parquet or tar files, or (if local) images."""
    kinds = {last_name(file).rpartition(".")[2].lower() for file in files}
    opener = _TABLES.get(f".{next(iter(kinds))}") if len(kinds) == 1 else None
    if opener is not None:
        return table_splits(opener, files, context)
    local = [file for file in files if isinstance(file, Path)]
    if len(local) < len(files):
        raise DataError(f"{shown(spec)} names .{', .'.join(sorted(kinds))} files", "give .tar or .parquet files")
    return {"train": pattern_source(spec, local, context)}


def _unknown(spec: str, path: Path) -> DataError:
    if path.name != spec or path.suffix:
        return DataError(f"no such file or folder: {path}", "check data.source")
    near = get_close_matches(spec, NAMED, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return DataError(
        f"{spec!r} is neither a path nor the name of a data set", f"{hint}names are {', '.join(sorted(NAMED))}"
    )


def folder_splits(folder: Path, context: Context = Context()) -> dict[str, Source]:
    """The splits of a folder of images, nested or flat; without images, those of its parquet, tar or .npy files.

    The names of folders give splits, masks and classes (`folders.roles`). Masks and images outside the splits are not
    used. Images are sorted by path, byte by byte. DataError: no such files, or the folder cannot be read.
    """
    listing = list_images(folder, picture_suffixes())
    if not len(listing.names):
        if not listing.others[".npy"] or any((folder / f"{prefix}images.npy").is_file() for prefix, _ in PREFIXES):
            return _other_splits(folder, listing, context)
        listing = list_images(folder, FORMATS["npy"].suffixes)  # one array per sample
    listing, context = _of_one_kind(folder, listing, context)
    return picture_splits(folder, listing, context)


def _of_one_kind(folder: Path, listing: Listing, context: Context) -> tuple[Listing, Context]:
    """Without files that cannot have as many axes as the model takes, or as most files have: clips beside photographs.

    Where all files are of one kind, or none would be left, the listing as it is.
    """
    content = listing.names.parts[0].lower()
    if not any(suffix.encode() in content for suffix in set(picture_suffixes()) - {*picture_suffixes(2)}):
        return listing, context
    names = [os.fsdecode(name).lower() for name in listing.names]
    suffixes = {dims: picture_suffixes(dims) for dims in (2, 3, 1)}
    fitting = {dims: sum(name.endswith(known) for name in names) for dims, known in suffixes.items()}
    dims = context.spatial_dims or max(fitting, key=fitting.__getitem__)
    if 0 < fitting[dims] < len(names):
        listing = list_images(folder, suffixes[dims])
    return listing, replace(context, spatial_dims=dims)


def _other_splits(folder: Path, listing: Listing, context: Context) -> dict[str, Source]:
    """The splits of a folder without images."""
    others = listing.others
    for suffix, opener in _TABLES.items():
        if others[suffix]:
            return table_splits(opener, sorted(folder.rglob(f"*{suffix}")), context)
    if others[".npy"]:
        return _npy_splits(folder, context)
    found = f"holds no images, only {others.total()} other files ({listing.kinds()})" if others else "is empty"
    unreadable = "".join(f"; {remark}" for remark in listing.remarks() if "cannot be read" in remark)
    raise DataError(f"{folder} {found}{unreadable}", _accepted())


def table_splits(opener: _Opener, files: Sequence[Place], context: Context) -> dict[str, Source]:
    """The splits of parquet or tar files, by the first word of their names (train-00000.tar), else by their folders."""
    groups: dict[str, list[Place]] = defaultdict(list)
    above = [str(file).split("/")[:-1] for file in files]
    shared = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, zip(*above, strict=False)))
    for file, folders in zip(files, above, strict=True):
        first_word = re.split(r"[-_.]", last_name(file), maxsplit=1)[0]
        words = (first_word, *reversed(folders[shared:]))
        groups[next(filter(None, map(split_named, words)), "")].append(file)
    remarks = []
    if "train" not in groups:
        others = [name for name in ("val", "test") if name in groups]
        remarks += [f"no train files, so that {name} files are trained on" for name in others]
        groups = {"train": list(files)}
    elif beside := groups.pop("", []):
        remarks.append(f"{len(beside):,} files beside the splits ({shortened(map(last_name, beside))}) not used")
    splits = {split: opener(members, context) for split, members in groups.items()}
    splits["train"].remarks += tuple(remarks)
    return splits


def _npy_splits(folder: Path, context: Context) -> dict[str, Source]:
    """The splits of a folder of .npy files with the names of an .npz file's arrays, and its classes.txt."""
    names = folder / CLASSES_FILE
    classes = names.read_text(encoding="utf-8", errors="replace").splitlines() if names.is_file() else None
    kinds = ("images", "labels", *([context.group] if context.group else []))
    there = {file.stem for file in folder.glob("*.npy")}
    files = (f"{prefix}{kind}" for prefix, _ in PREFIXES for kind in kinds)
    arrays = {name: FileArray(folder / f"{name}.npy") for name in files if name in there}
    return named_arrays(arrays, context, folder.name, classes)
