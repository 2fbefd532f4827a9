"""What the user points at, a folder, a file or a name, to the splits it holds."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

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
from torchmae.data.folders import SPLIT_NAMES, Masks, Role, is_system_name, masks_among, roles, split_named
from torchmae.data.formats import FORMATS, Context, missing_extra, picture_suffixes
from torchmae.data.hub import HUB_PREFIX, hub_splits
from torchmae.data.labels import ordered_classes
from torchmae.data.lists import is_pattern, list_splits, matching, pattern_source
from torchmae.data.named import NAMED, open_named
from torchmae.data.parquet import ParquetSource
from torchmae.data.remote import Place, expand_url, is_url, last_name, shown
from torchmae.data.shards import CLASSES_FILE, ShardSource
from torchmae.data.sources import FileSource, Source, each_page, printable
from torchmae.data.strings import Strings, StringsWriter, join_strings, pack_strings
from torchmae.errors import ConfigError, DataError
from torchmae.paths import user_path

_LISTED = 5  # names in a remark


def _accepted() -> str:
    data_sets = ", ".join(suffix for layout in LAYOUTS.values() for suffix in layout.suffixes)
    return f"accepted are {', '.join(picture_suffixes())}, or {data_sets}"


def open_splits(spec: str, context: Context = Context()) -> dict[str, Source]:
    """Opens a data set.

    Args:
        spec: a name ("digits", or one of torchvision's sets); the path of a folder (of images, or of parquet, tar or
            .npy files) or of a single file (see `_open_file`); a pattern of paths ("photos/**/*.jpg"); the URL of a
            file, also with {000..099} or *; or hf: and what the Hugging Face `datasets` library loads. A name wins
            over a folder of that name: write "./cifar10" for the folder.
        context: how it is opened and read.

    Returns:
        split name to source; always "train", and "val" and "test" where the data has them.

    Raises:
        DataError: nothing there, or nothing that can be used.
    """
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
    """One kind of thing that a data source may be.

    Attributes:
        fits: whether a source, as the user gives it, is of this kind.
        open: its splits.
        suffixes: of files of this kind, where it is one of files.
    """

    fits: Callable[[str], bool]
    open: Callable[[str, Context], dict[str, Source]]
    suffixes: tuple[str, ...] = ()


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
    "list": file_layout(
        (".csv", ".tsv", ".txt", ".lst"), lambda path, context: list_splits(path, SPLIT_NAMES, context)
    ),
    "file": Layout(lambda spec: user_path(spec).is_file(), _refuse_file),
    "pattern": Layout(is_pattern, lambda spec, context: _open_files(spec, matching(spec), context)),
}
"""What opens a data source, by the kind that it is; the first row that fits counts. A row more teaches all commands."""


def _open_files(spec: str, files: Sequence[Place], context: Context) -> dict[str, Source]:
    """The splits of the files that a pattern or a URL stands for: parquet or tar files, or (if local) images."""
    kinds = {last_name(file).rpartition(".")[2].lower() for file in files}
    if kinds == {"parquet"}:
        return table_splits(ParquetSource, files, context)
    if kinds == {"tar"}:
        return table_splits(ShardSource, files, context)
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
    not used. Sub-folders are classes where every image lies in one and there are two or more. Hidden and system files
    are passed over, links to folders followed, each folder read once. Images are in the order of their paths, byte by
    byte.

    Args:
        folder: an existing folder.
        context: how it is opened and read.

    Raises:
        DataError: nothing of that in it, with what was there instead; or a folder that cannot be read.
    """
    listing = list_images(folder, picture_suffixes())
    if not len(listing.names):
        if listing.others[".npy"] and not any((folder / f"{prefix}images.npy").is_file() for prefix, _ in PREFIXES):
            listing = list_images(folder, FORMATS["npy"].suffixes)  # one array a sample
        else:
            return _other_splits(folder, listing, context)
    is_mask = np.zeros(len(listing.names), dtype=bool)
    is_mask[masks_among(listing.names)] = True
    role_of = dict(zip(places := sorted({place for place, _ in listing.runs}), roles(places), strict=True))
    runs: dict[str, list[_Run]] = defaultdict(list)
    start = 0
    for place, count in listing.runs:
        role = role_of[place]
        is_mask[start : start + count] |= bool(role.masks)
        if role.split:
            runs[role.split].append(_Run(start, count, role.label))
        start += count
    trained = {run.label for run in runs["train"] if run.label is not None}
    classes = ordered_classes(trained, (run.label for members in runs.values() for run in members if run.label))
    number = {name: i for i, name in enumerate(classes)}
    remarks = _folder_remarks(folder, listing, role_of, is_mask, len(trained) if len(classes) > 1 else 0)
    masks = Masks(folder, pack_strings(listing.names[i] for i in np.flatnonzero(is_mask).tolist()))
    splits: dict[str, Source] = {}
    for split, members in runs.items():
        rows = np.concatenate([np.arange(run.start, run.start + run.size) for run in members])
        kept = ~is_mask[rows]
        labels = None
        if len(classes) > 1 and all(run.label is not None for run in members):
            labels = np.repeat([number[run.label or ""] for run in members], [run.size for run in members])[kept]
        if kept.all():
            names = join_strings([listing.names.between(run.start, run.start + run.size) for run in members])
        else:
            names = pack_strings(listing.names[row] for row in rows[kept].tolist())
        own = classes[: len(trained)] if split == "train" else classes
        source = FileSource(folder, names, labels, None if labels is None else own, context, remarks)
        source.masks = masks if len(masks) else None
        splits[split] = source
    return splits


class _Run(NamedTuple):
    """Images that follow each other in a listing and lie in one folder: where they start, how many, their class."""

    start: int
    size: int
    label: str | None


def _folder_remarks(
    folder: Path, listing: Listing, role_of: Mapping[str, Role], is_mask: npt.NDArray[np.bool_], num_classes: int
) -> list[str]:
    """What was decided about a folder, and what in it is not used, a short phrase each."""
    counts: Counter[str] = Counter()  # of pictures, by split; "" beside the splits
    beside: set[str] = set()
    mask_places: set[str] = set()
    start = 0
    for place, count in listing.runs:
        role, masked = role_of[place], int(is_mask[start : start + count].sum())
        start += count
        if not role.masks:
            counts[role.split] += count - masked
        if masked:
            mask_places.add(f"{role.masks}/" if role.masks else "*_mask")
        if not role.split and not role.masks:
            beside.add(f"{place.partition('/')[0] or '.'}/")
    found = [split for split in ("train", "val", "test") if counts[split]]
    remarks = [f"splits {'/'.join(found)} found"] if len(found) > 1 or counts[""] else []
    if num_classes:
        remarks.append(f"labels from folders ({num_classes} classes)")
    if found == ["train"]:
        names = (f"{split}{suffix}" for split in SPLIT_NAMES for suffix in LAYOUTS["list"].suffixes)
        if lists := [name for name in names if (folder / name).is_file()]:
            remarks.append(f"lists {', '.join(lists)} not used, so that all images are trained on")
        tops = sorted({place.partition("/")[0] for place in role_of})
        remarks += [
            f"no train folder, so that {top}/ is trained on" for top in tops if split_named(top) in ("val", "test")
        ]
    if counts[""]:
        remarks.append(f"{counts['']:,} images beside the splits ({_some(beside)}) not used")
    if is_mask.any():
        remarks.append(f"{int(is_mask.sum()):,} masks ({_some(mask_places)}) not used")
    if listing.twins:
        number, example = listing.twins
        remarks.append(
            f"{number:,} images share name and folder with another ({example}) and are used all the same: "
            f"'{printable(os.fsencode(folder))}/**/*.SUFFIX' gives one kind alone"
        )
    return [*remarks, *listing.remarks()]


def _some(names: Iterable[str]) -> str:
    ordered = sorted(printable(os.fsencode(name)) for name in names)
    return ", ".join(ordered[:_LISTED]) + (f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else "")


def _other_splits(folder: Path, listing: Listing, context: Context) -> dict[str, Source]:
    """The splits of a folder without images."""
    others = listing.others
    if others[".parquet"]:
        return table_splits(ParquetSource, sorted(folder.rglob("*.parquet")), context)
    if others[".tar"]:
        return table_splits(ShardSource, sorted(folder.rglob("*.tar")), context)
    if others[".npy"]:
        return npy_splits(folder, context)
    found = f"holds no images, only {others.total()} other files ({listing.kinds()})" if others else "is empty"
    unreadable = "".join(f"; {remark}" for remark in listing.remarks() if "cannot be read" in remark)
    raise DataError(f"{folder} {found}{unreadable}", _accepted())


@dataclass
class Listing:
    """The image files under a folder.

    Attributes:
        names: their paths relative to the folder, with "/", sorted byte by byte.
        runs: the folders that they lie in ("" is the folder itself, "a/b"), and how many names after the last that is;
            a folder comes again where those of its sub-folders stand between its own.
        others: how many other files there are of each suffix.
        system: how many hidden or system files and folders of each name were passed over; of files, only pictures.
        unreadable: folders that cannot be read, with the reason.
        twins: images that share folder and name but not the suffix: how many, and an example; () where none do.
    """

    names: Strings
    runs: list[tuple[str, int]]
    others: Counter[str]
    system: Counter[str]
    unreadable: dict[str, str]
    twins: tuple[int, str] | tuple[()] = ()

    def remarks(self) -> list[str]:
        """What was passed over, a short phrase each."""
        found = [f"{self.kinds()} not used"] if self.others else []
        if self.system:
            found.append(
                f"{self.system.total():,} hidden or system files and folders ({_some(self.system)}) passed over"
            )
        for place, reason in list(self.unreadable.items())[:_LISTED]:
            found.append(f"folder {place} cannot be read ({reason}) and is passed over")
        if len(self.unreadable) > _LISTED:
            found.append(f"{len(self.unreadable) - _LISTED:,} more folders cannot be read and are passed over")
        return found

    def kinds(self) -> str:
        """The other files, the most frequent kinds first."""
        most = sorted(self.others.items(), key=lambda item: (-item[1], item[0]))
        shown = []
        for suffix, count in most[:_LISTED]:
            extra = missing_extra(suffix)
            shown.append(f"{count:,} {suffix or 'without suffix'}" + (f" (pip install '{extra}')" if extra else ""))
        more = sum(count for _, count in most[_LISTED:])
        return ", ".join([*shown, *([f"{more:,} more files"] if more else [])])


def list_images(folder: Path, suffixes: tuple[str, ...]) -> Listing:
    """Lists the image files under a folder: what is held of a million of them is their paths, end to end.

    Folders below it that cannot be read are passed over.

    Raises:
        DataError: the folder itself cannot be read.
    """
    names = StringsWriter()
    listing = Listing(pack_strings([]), [], Counter(), Counter(), {})
    visited: set[tuple[int, int]] = set()
    last, num_twins, example = (b"", b""), 0, ""
    # Folders yet to be listed and files yet to be taken, the next one last. Sorted with a "/" behind the name of each
    # folder, entries come in the order of the full paths.
    waiting = [b"/"]
    while waiting:
        entry = waiting.pop()
        if entry.endswith(b"/"):
            try:
                waiting += _entries(folder, entry.strip(b"/"), visited, suffixes, listing.system)
            except OSError as error:
                place = printable(entry.strip(b"/"))
                if not place:
                    raise DataError(
                        f"cannot read folder {printable(os.fsencode(folder))}: {error.strerror}",
                        "mend its permissions, or give another",
                    ) from error
                listing.unreadable[place] = error.strerror or str(error)
            continue
        place = os.fsdecode(entry.rpartition(b"/")[0])
        name = os.fsdecode(entry.rpartition(b"/")[2]).lower()
        if not name.endswith(suffixes):
            listing.others[os.path.splitext(name)[1]] += 1  # noqa: PTH122 (a Path is slow)
            continue
        names.add(entry)
        stem, _, suffix = entry.rpartition(b".")
        if stem == last[0] and not num_twins:
            example = f"{os.fsdecode(stem.rpartition(b'/')[2])}.{os.fsdecode(last[1])}, .{os.fsdecode(suffix)}"
        num_twins += stem == last[0]
        last = stem, suffix
        if listing.runs and listing.runs[-1][0] == place:
            listing.runs[-1] = place, listing.runs[-1][1] + 1
        else:
            listing.runs.append((place, 1))
    listing.names = names.finish()
    listing.twins = (num_twins, printable(os.fsencode(example))) if num_twins else ()
    return listing


def _entries(
    folder: Path, place: bytes, visited: set[tuple[int, int]], suffixes: tuple[str, ...], system: Counter[str]
) -> list[bytes]:
    """Paths of what is to be looked at in a folder, with "/" behind those of folders, the first one last.

    Args:
        folder: the root.
        place: the folder's path relative to it.
        visited: device and number of the folders listed so far.
        suffixes: of pictures.
        system: counts the hidden and system folders, and pictures of such names, that are passed over.

    Raises:
        OSError: it cannot be read.
    """
    path = os.fsencode(folder) + (b"/" + place if place else b"")
    found = []
    status = os.stat(path)  # noqa: PTH116 (a Path for each folder of a million is slow)
    if (status.st_dev, status.st_ino) in visited:  # a link back up, or a second link to the same folder
        return []
    visited.add((status.st_dev, status.st_ino))
    with os.scandir(path) as entries:
        for entry in entries:
            is_folder = entry.is_dir()
            if is_system_name(entry.name):
                name = os.fsdecode(entry.name)
                if is_folder or name.lower().endswith(suffixes):
                    system["._*" if name.startswith("._") else name] += 1
                continue
            found.append((place + b"/" if place else b"") + entry.name + (b"/" if is_folder else b""))
    found.sort(reverse=True)
    return found


class _Opener(Protocol):
    """A source that many files make up."""

    def __call__(self, files: Sequence[Place], context: Context, /) -> Source:
        """Opens it."""


def table_splits(opener: _Opener, files: Sequence[Place], context: Context) -> dict[str, Source]:
    """The splits of parquet or tar files by the first word of their names (train-00000.tar) or by their folders.

    Files whose names begin with no split are all training data, unless there are train files too.
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
        remarks.append(f"{len(beside):,} files beside the splits ({_some(map(last_name, beside))}) not used")
    splits = {split: opener(members, context) for split, members in groups.items()}
    splits["train"].remarks += tuple(remarks)
    return splits


def npy_splits(folder: Path, context: Context) -> dict[str, Source]:
    """The splits of a folder of .npy files named as the arrays of an .npz file, with the classes in classes.txt.

    Raises:
        DataError: no images.npy or train_images.npy among them.
    """
    names = folder / CLASSES_FILE
    classes = names.read_text(encoding="utf-8", errors="replace").splitlines() if names.is_file() else None
    files = [f"{prefix}{kind}" for prefix, _ in PREFIXES for kind in ("images", "labels")]
    arrays = {name: FileArray(folder / f"{name}.npy") for name in files if (folder / f"{name}.npy").is_file()}
    return named_arrays(arrays, context, folder.name, classes)
