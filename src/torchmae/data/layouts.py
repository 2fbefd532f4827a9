"""What the user points at, a folder, a file or a name, to the splits it holds."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

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
from torchmae.data.formats import FORMATS, Context, picture_suffixes
from torchmae.data.hub import HUB_PREFIX, hub_splits
from torchmae.data.labels import ordered_classes
from torchmae.data.lists import csv_splits, is_pattern, matching, pattern_source, text_source
from torchmae.data.named import NAMED, open_named
from torchmae.data.parquet import ParquetSource
from torchmae.data.remote import Place, expand_url, is_url, last_name, shown
from torchmae.data.shards import CLASSES_FILE, ShardSource
from torchmae.data.sources import FileSource, Source, each_page, printable
from torchmae.data.strings import Strings, StringsWriter, join_strings
from torchmae.errors import ConfigError, DataError

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
"""Folder (or parquet file) names that mean a split, in lower case; case does not matter."""


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
        raise _unknown(spec, Path(spec).expanduser())
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
        path = Path(spec).expanduser()
        return path.suffix.lower() in suffixes and path.exists() and path.is_dir() == (suffixes == (ZARR_SUFFIX,))

    return Layout(fits, lambda spec, context: opener(Path(spec).expanduser(), context), suffixes)


def _open_array(path: Path, context: Context) -> dict[str, Source]:
    return {"train": ArraySource(FileArray(path), title=path.name, context=context)}


def _refuse_file(spec: str, context: Context) -> dict[str, Source]:
    del context
    path = Path(spec).expanduser()
    suffix = path.suffix.lower()
    hint = (
        f"give its folder: {path.parent}" if suffix in picture_suffixes() else f"unpack archives first; {_accepted()}"
    )
    raise DataError(f"{path} is a single file of type {suffix or '(none)'}", hint)


LAYOUTS: dict[str, Layout] = {
    "named": Layout(lambda spec: spec in NAMED, open_named),
    "hub": Layout(
        lambda spec: spec.startswith(HUB_PREFIX),
        lambda spec, context: hub_splits(spec.removeprefix(HUB_PREFIX), SPLIT_FOLDERS, context),
    ),
    "url": Layout(is_url, lambda spec, context: _open_files(spec, expand_url(spec), context)),
    "zarr": file_layout((ZARR_SUFFIX,), stored_splits),
    "folder": Layout(
        lambda spec: Path(spec).expanduser().is_dir(),
        lambda spec, context: folder_splits(Path(spec).expanduser(), context),
    ),
    "npy": file_layout((".npy",), _open_array),
    "npz": file_layout((".npz",), npz_splits),
    "hdf5": file_layout(HDF5_SUFFIXES, stored_splits),
    "parquet": file_layout((".parquet",), lambda path, context: {"train": ParquetSource([path], context)}),
    "tar": file_layout((".tar",), lambda path, context: {"train": ShardSource([path], context)}),
    "csv": file_layout((".csv", ".tsv"), lambda path, context: csv_splits(path, SPLIT_FOLDERS, context)),
    "text": file_layout((".txt",), lambda path, context: {"train": text_source(path, context)}),
    "file": Layout(lambda spec: Path(spec).expanduser().is_file(), _refuse_file),
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

    A folder that holds train (or training) with images is read as splits: that one, val (or valid, validation) and
    test; what lies beside them is not used. Any other folder is all training data.

    Sub-folders are classes where every image of a split lies in one and there are two or more: the label is the
    first folder under the split. Shards (00/, 01/, ...) look the same and become classes too, which matters to
    nobody but the kNN figure. Hidden files are passed over, links to folders followed, each folder read once. Images
    are in the order of their paths, byte by byte.

    Args:
        folder: an existing folder.
        context: how it is opened and read.

    Raises:
        DataError: nothing of that in it; what was there instead.
    """
    listing = list_images(folder, picture_suffixes())
    if not len(listing.names):
        if listing.others[".npy"] and not any((folder / f"{prefix}images.npy").is_file() for prefix, _ in PREFIXES):
            listing = list_images(folder, FORMATS["npy"].suffixes)  # one array a sample
        else:
            return _other_splits(folder, listing.others, context)
    runs: dict[str, list[_Run]] = defaultdict(list)
    start = 0
    for place, count in listing.runs:
        parts = place.split("/") if place else []
        split = SPLIT_FOLDERS.get(parts[0].lower(), "") if parts else ""
        runs[split].append(_Run(start, count, parts))
        start += count
    if "train" in runs:
        runs.pop("", None)
        depth = 1
    else:
        runs = {"train": sorted(run for members in runs.values() for run in members)}
        depth = 0
    of_run = {split: _class_names(members, depth) for split, members in runs.items()}
    trained = set(of_run["train"] or ())
    classes = ordered_classes(trained, (name for names in of_run.values() for name in names or ()))
    number = {name: i for i, name in enumerate(classes)}
    splits: dict[str, Source] = {}
    for split, members in runs.items():
        labels, of_members = None, of_run[split]
        if of_members is not None and len(classes) > 1:
            labels = np.repeat([number[name] for name in of_members], [run.size for run in members])
        names = join_strings([listing.names.between(run.start, run.start + run.size) for run in members])
        own = classes[: len(trained)] if split == "train" else classes
        splits[split] = FileSource(folder, names, labels, None if labels is None else own, context)
    return splits


class _Run(NamedTuple):
    """Images that follow each other in a listing and lie in one folder: where they start, how many, the folder."""

    start: int
    size: int
    parts: list[str]


def _class_names(runs: Sequence[_Run], depth: int) -> list[str] | None:
    """The folder at `depth` of each run; None unless every image lies in one there."""
    return [run.parts[depth] for run in runs] if all(len(run.parts) > depth for run in runs) else None


def _other_splits(folder: Path, others: Counter[str], context: Context) -> dict[str, Source]:
    """The splits of a folder without images."""
    if others[".parquet"]:
        return table_splits(ParquetSource, sorted(folder.rglob("*.parquet")), context)
    if others[".tar"]:
        return table_splits(ShardSource, sorted(folder.rglob("*.tar")), context)
    if others[".npy"]:
        return npy_splits(folder, context)
    most = sorted(others.items(), key=lambda item: (-item[1], item[0]))[:5]
    seen = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in most)
    found = f"holds no images, only {others.total()} other files ({seen})" if others else "is empty"
    raise DataError(f"{folder} {found}", _accepted())


class Listing(NamedTuple):
    """The image files under a folder.

    Attributes:
        names: their paths relative to the folder, with "/", sorted byte by byte.
        runs: the folders that they lie in ("" is the folder itself, "a/b"), and how many names after the last that is;
            a folder comes again where those of its sub-folders stand between its own.
        others: how many other files there are of each suffix.
    """

    names: Strings
    runs: list[tuple[str, int]]
    others: Counter[str]


def list_images(folder: Path, suffixes: tuple[str, ...]) -> Listing:
    """Lists the image files under a folder: what is held of a million of them is their paths, end to end.

    Raises:
        DataError: a folder that cannot be read.
    """
    names = StringsWriter()
    runs: list[tuple[str, int]] = []
    others: Counter[str] = Counter()
    visited: set[tuple[int, int]] = set()
    # Folders yet to be listed and files yet to be taken, the next one last. Sorted with a "/" behind the name of each
    # folder, entries come in the order of the full paths.
    waiting = [b"/"]
    while waiting:
        entry = waiting.pop()
        if entry.endswith(b"/"):
            waiting += _entries(folder, entry.strip(b"/"), visited)
            continue
        place = os.fsdecode(entry.rpartition(b"/")[0])
        name = os.fsdecode(entry.rpartition(b"/")[2]).lower()
        if not name.endswith(suffixes):
            others[os.path.splitext(name)[1]] += 1  # noqa: PTH122 (a Path is slow)
            continue
        names.add(entry)
        if runs and runs[-1][0] == place:
            runs[-1] = place, runs[-1][1] + 1
        else:
            runs.append((place, 1))
    return Listing(names.finish(), runs, others)


def _entries(folder: Path, place: bytes, visited: set[tuple[int, int]]) -> list[bytes]:
    """Paths of what is to be looked at in a folder, with "/" behind those of folders, the first one last.

    Args:
        folder: the root.
        place: the folder's path relative to it.
        visited: device and number of the folders listed so far.
    """
    path = os.fsencode(folder) + (b"/" + place if place else b"")
    found = []
    try:
        status = os.stat(path)  # noqa: PTH116 (a Path for each folder of a million is slow)
        if (status.st_dev, status.st_ino) in visited:  # a link back up, or a second link to the same folder
            return []
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if not entry.is_dir():
                    found.append(place + b"/" + entry.name if place else entry.name)
                elif not entry.name.startswith(b"__MACOSX"):
                    found.append((place + b"/" + entry.name if place else entry.name) + b"/")
    except OSError as error:
        raise DataError(
            f"cannot read folder {printable(path)}: {error.strerror}", "mend its permissions, or move it away"
        ) from error
    found.sort(reverse=True)
    return found


class _Opener(Protocol):
    """A source that many files make up."""

    def __call__(self, files: Sequence[Place], context: Context, /) -> Source:
        """Opens it."""


def table_splits(opener: _Opener, files: Sequence[Place], context: Context) -> dict[str, Source]:
    """The splits of parquet or tar files by the first word of their names: train-00000.tar, validation_1.parquet.

    Files whose names begin with no split are all training data, unless there are train files too.
    """
    groups: dict[str, list[Place]] = defaultdict(list)
    for file in files:
        first_word = re.split(r"[-_.]", last_name(file).lower(), maxsplit=1)[0]
        groups[SPLIT_FOLDERS.get(first_word, "")].append(file)
    if "train" not in groups:
        groups = {"train": list(files)}
    groups.pop("", None)
    return {split: opener(members, context) for split, members in groups.items()}


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
