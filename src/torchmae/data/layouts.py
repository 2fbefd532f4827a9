"""What the user points at, a folder, a file or a name, to the splits it holds."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

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
from torchmae.data.folders import (
    SPLIT_NAMES,
    Listing,
    Masks,
    Role,
    list_images,
    masks_among,
    roles,
    shortened,
    split_named,
)
from torchmae.data.formats import FORMATS, Context, picture_suffixes
from torchmae.data.hub import HUB_PREFIX, hub_splits
from torchmae.data.labels import ordered_classes
from torchmae.data.lists import list_splits, matching, pattern_source
from torchmae.data.named import NAMED, open_named
from torchmae.data.parquet import ParquetSource
from torchmae.data.remote import Place, expand_url, is_url, last_name, shown
from torchmae.data.shards import CLASSES_FILE, ShardSource
from torchmae.data.sources import FileSource, Source, Strings, each_page
from torchmae.errors import ConfigError, DataError, printable
from torchmae.paths import user_path


def _accepted() -> str:
    data_sets = ", ".join(suffix for layout in LAYOUTS.values() for suffix in layout.suffixes)
    return f"accepted are {', '.join(picture_suffixes())}, or {data_sets}"


def open_splits(spec: str, context: Context = Context(), own: Mapping[str, Source] | None = None) -> dict[str, Source]:
    """Opens a data set: the source of each split, always "train", and "val" and "test" where the data has them.

    Args:
        spec: a name ("digits", or one of torchvision's sets); the path of a folder (of images, or of parquet, tar or
            .npy files) or of a single file; a pattern of paths ("photos/**/*.jpg"); the URL of a file, also with
            {000..099} or *; or hf: and what the Hugging Face `datasets` library loads. A name wins over a folder of
            that name: write "./cifar10" for the folder.
        context: how it is opened and read.
        own: sources of a caller's own, by split, which `spec` "own" stands for.

    Raises:
        DataError: nothing there, or nothing that can be used.
        ConfigError: `spec` is empty, or "own" without any.
    """
    if spec == OWN:
        if own is None:
            raise ConfigError("data.source is 'own', an object handed over in Python", "hand it over: source=SOURCE")
        return dict(own)
    if not spec:
        raise ConfigError("data.source is empty", "give a folder, a file, or a name such as digits")
    layout = next((layout for layout in LAYOUTS.values() if layout.fits(spec)), None)
    if layout is None:
        raise _unknown(spec, user_path(spec))
    splits = layout.open(spec, context)
    if context.pages == "all":
        return {split: each_page(source, context.progress) for split, source in splits.items()}
    return splits


class Layout(NamedTuple):
    """One kind of thing that a data source may be."""

    fits: Callable[[str], bool]  # whether a source, as the user gives it, is of this kind
    open: Callable[[str, Context], dict[str, Source]]  # its splits
    suffixes: tuple[str, ...] = ()  # of files of this kind, where it is one of files


def file_layout(suffixes: tuple[str, ...], opener: Callable[[Path, Context], dict[str, Source]]) -> Layout:
    """The layout of single files with these suffixes, in lower case, that are a data set each."""

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
_TABLES: dict[str, _Opener] = {".parquet": ParquetSource, ".tar": ShardSource}  # kinds of which many files are one set

LAYOUTS: dict[str, Layout] = {
    "named": Layout(lambda spec: spec in NAMED, open_named),
    "hub": Layout(
        lambda spec: spec.startswith(HUB_PREFIX),
        lambda spec, context: hub_splits(spec.removeprefix(HUB_PREFIX), SPLIT_NAMES, context),
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
    "list": file_layout((".csv", ".tsv", ".txt", ".lst"), list_splits),
    "file": Layout(lambda spec: user_path(spec).is_file(), _refuse_file),
    "pattern": Layout(
        lambda spec: any(sign in spec for sign in "*?[{"),
        lambda spec, context: _open_files(spec, matching(spec), context),
    ),
}
"""What opens a data source, by the kind that it is; the first row that fits counts. A row more teaches all commands."""


def _open_files(spec: str, files: Sequence[Place], context: Context) -> dict[str, Source]:
    """The splits of the files that a pattern or a URL stands for: parquet or tar files, or (if local) images."""
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
    """The splits of a folder of images, nested or flat; of one without images, those of its parquet, tar or .npy files.

    Splits, masks and classes go by the names of folders (`folders.roles`). Masks and what lies beside the splits is
    not used. Sub-folders are classes where every image lies in one and there are two or more. Images are in the order
    of their paths, byte by byte.

    Raises:
        DataError: it holds none of these, or cannot be read.
    """
    listing = list_images(folder, picture_suffixes())
    if not len(listing.names):
        if not listing.others[".npy"] or any((folder / f"{prefix}images.npy").is_file() for prefix, _ in PREFIXES):
            return _other_splits(folder, listing, context)
        listing = list_images(folder, FORMATS["npy"].suffixes)  # one array a sample
    found = roles(listing.places)
    place_of = np.frombuffer(listing.place_of, dtype=np.intc)
    is_mask = np.array([bool(role.masks) for role in found])[place_of]
    is_mask[masks_among(listing.names)] = True
    split_of = np.array([role.split for role in found])
    trained = {role.label for role in found if role.split == "train" and role.label is not None}
    classes = ordered_classes(trained, (role.label for role in found if role.split and role.label is not None))
    number_of = {name: i for i, name in enumerate(classes)}
    label_of = np.array([number_of.get(role.label or "", -1) for role in found])
    remarks = _folder_remarks(folder, listing, found, is_mask, len(trained) if len(classes) > 1 else 0)
    masks = Masks(folder, Strings(listing.names[i] for i in np.flatnonzero(is_mask).tolist()))
    splits: dict[str, Source] = {}
    for split in dict.fromkeys(role.split for role in found if role.split):
        rows = np.flatnonzero((split_of == split)[place_of] & ~is_mask)
        whole = len(rows) == len(listing.names)
        names = listing.names if whole else Strings(listing.names[row] for row in rows.tolist())
        labelled = len(classes) > 1 and all(role.label is not None for role in found if role.split == split)
        labels = label_of[place_of[rows]] if labelled else None
        own = (classes[: len(trained)] if split == "train" else classes) if labelled else None
        source = FileSource(folder, names, labels, own, context, remarks)
        source.masks = masks if len(masks) else None
        splits[split] = source
    return splits


def _folder_remarks(
    folder: Path, listing: Listing, found: Sequence[Role], is_mask: npt.NDArray[np.bool_], num_classes: int
) -> list[str]:
    """What was decided about a folder, and what in it is not used, a short phrase each."""
    place_of = np.frombuffer(listing.place_of, dtype=np.intc)
    masks_in, images_in = (np.bincount(place_of[rows], minlength=len(found)) for rows in (is_mask, ~is_mask))
    counts: Counter[str] = Counter()  # of pictures, by split; "" beside the splits
    for role, count in zip(found, images_in.tolist(), strict=True):
        counts[role.split] += count
    names = [split for split in ("train", "val", "test") if counts[split]]
    remarks = [f"splits {'/'.join(names)} found"] if len(names) > 1 or counts[""] else []
    if num_classes:
        remarks.append(f"labels from folders ({num_classes} classes)")
    tops = {place: place.partition("/")[0] for place in listing.places}
    if names == ["train"]:
        files = (f"{split}{suffix}" for split in SPLIT_NAMES for suffix in LAYOUTS["list"].suffixes)
        if lists := [name for name in files if (folder / name).is_file()]:
            remarks.append(f"lists {', '.join(lists)} not used, so that all images are trained on")
        held_out = sorted({top for top in tops.values() if split_named(top) in ("val", "test")})
        remarks += [f"no train folder, so that {top}/ is trained on" for top in held_out]
    if counts[""]:
        beside = {f"{tops[place] or '.'}/" for place, role in zip(listing.places, found, strict=True) if not role.split}
        beside -= {f"{role.masks}/" for role in found}
        remarks.append(f"{counts['']:,} images beside the splits ({shortened(beside)}) not used")
    if is_mask.any():
        where = {f"{role.masks}/" if role.masks else "*_mask" for role, n in zip(found, masks_in, strict=True) if n}
        remarks.append(f"{int(is_mask.sum()):,} masks ({shortened(where)}) not used")
    if listing.num_twins:
        remarks.append(
            f"{listing.num_twins:,} images share name and folder with another ({listing.twin}) and are used all the "
            f"same: '{printable(os.fsencode(folder))}/**/*.SUFFIX' gives one kind alone"
        )
    return [*remarks, *listing.remarks()]


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
    """The splits of parquet or tar files by the first word of their names (train-00000.tar) or by their folders.

    Files whose names mean no split are training data, unless there are train files too.
    """
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
    """The splits of a folder of .npy files named as the arrays of an .npz file, with the classes in classes.txt."""
    names = folder / CLASSES_FILE
    classes = names.read_text(encoding="utf-8", errors="replace").splitlines() if names.is_file() else None
    files = [f"{prefix}{kind}" for prefix, _ in PREFIXES for kind in ("images", "labels")]
    arrays = {name: FileArray(folder / f"{name}.npy") for name in files if (folder / f"{name}.npy").is_file()}
    return named_arrays(arrays, context, folder.name, classes)
