"""What the user points at, a folder, a file or a name, to the splits it holds."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from torchmae.data.decode import IMAGE_SUFFIXES, check_channels
from torchmae.data.hub import HUB_PREFIX, hub_splits
from torchmae.data.labels import ordered_classes
from torchmae.data.lists import csv_splits, is_pattern, matching, pattern_source, text_source
from torchmae.data.named import NAMED, open_named
from torchmae.data.parquet import ParquetSource
from torchmae.data.reading import Progress
from torchmae.data.remote import Place, expand_url, is_url, last_name, shown
from torchmae.data.shards import CLASSES_FILE, ShardSource
from torchmae.data.sources import ArraySource, FileSource, Source, map_array, printable, unpacked_bytes
from torchmae.data.stored import HDF5_SUFFIXES, PREFIXES, ZARR_SUFFIX, stored_splits
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

_ACCEPTED = (
    f"accepted are {', '.join(IMAGE_SUFFIXES)}, or .npy, .npz, .parquet, .tar, .csv, .tsv, .txt, .h5, .hdf5 and .zarr"
)


def open_splits(
    spec: str,
    root: str,
    channels: int | None = None,
    spatial_dims: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Source]:
    """Opens a data set.

    Args:
        spec: a name ("digits", or one of torchvision's sets); the path of a folder (of images, or of parquet, tar or
            .npy files) or of a single file (see `_open_file`); a pattern of paths ("photos/**/*.jpg"); the URL of a
            file, also with {000..099} or *; or hf: and what the Hugging Face `datasets` library loads. A name wins
            over a folder of that name: write "./cifar10" for the folder.
        root: where torchvision's sets are kept and downloaded to.
        channels: 1 or 3 for image files; None: what each file has.
        spatial_dims: how many axes of an array are spatial, as in `ArraySource`.
        progress: told how far indexing shards and unpacking parquet files are.

    Returns:
        split name to source; always "train", and "val" and "test" where the data has them.

    Raises:
        DataError: nothing there, or nothing that can be used.
    """
    if not spec:
        raise ConfigError("data.source is empty", "give a folder, a file, or a name such as digits")
    if spec in NAMED:
        splits = open_named(spec, root)
        return splits if channels is None else {name: item.with_channels(channels) for name, item in splits.items()}
    if spec.startswith(HUB_PREFIX):
        return hub_splits(spec.removeprefix(HUB_PREFIX), SPLIT_FOLDERS, channels)
    if is_url(spec):
        return _open_files(spec, expand_url(spec), channels, progress)
    path = Path(spec).expanduser()
    if path.suffix.lower() == ZARR_SUFFIX and path.is_dir():
        return stored_splits(path, spatial_dims)
    if path.is_dir():
        return folder_splits(path, channels, spatial_dims, progress)
    if path.is_file():
        return _open_file(path, channels, spatial_dims, progress)
    if is_pattern(spec):
        return _open_files(spec, matching(spec), channels, progress)
    raise _unknown(spec, path)


def _open_file(
    path: Path, channels: int | None, spatial_dims: int | None, progress: Progress | None
) -> dict[str, Source]:
    """The splits of a single file, by its suffix; DataError for one that holds no data set."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return {"train": ArraySource(map_array(path), title=path.name, spatial_dims=spatial_dims, file=path)}
    if suffix == ".npz":
        return npz_splits(path, spatial_dims)
    if suffix == ".parquet":
        return {"train": ParquetSource([path], channels, progress)}
    if suffix == ".tar":
        return {"train": ShardSource([path], channels, progress)}
    if suffix in (".csv", ".tsv"):
        return csv_splits(path, SPLIT_FOLDERS, channels)
    if suffix == ".txt":
        return {"train": text_source(path, channels)}
    if suffix in HDF5_SUFFIXES:
        return stored_splits(path, spatial_dims)
    hint = f"give its folder: {path.parent}" if suffix in IMAGE_SUFFIXES else "unpack archives first; " + _ACCEPTED
    raise DataError(f"{path} is a single file of type {suffix or '(none)'}", hint)


def _open_files(
    spec: str, files: Sequence[Place], channels: int | None, progress: Progress | None
) -> dict[str, Source]:
    """The splits of the files that a pattern or a URL stands for: parquet or tar files, or (if local) images."""
    kinds = {last_name(file).rpartition(".")[2].lower() for file in files}
    if kinds == {"parquet"}:
        return table_splits(ParquetSource, files, channels, progress)
    if kinds == {"tar"}:
        return table_splits(ShardSource, files, channels, progress)
    local = [file for file in files if isinstance(file, Path)]
    if len(local) < len(files):
        raise DataError(f"{shown(spec)} names .{', .'.join(sorted(kinds))} files", "give .tar or .parquet files")
    return {"train": pattern_source(spec, local, channels)}


def memory_bytes() -> float:
    """Memory of this machine; infinite where it does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, others not these names
        return float("inf")


def _unknown(spec: str, path: Path) -> DataError:
    if path.name != spec or path.suffix:
        return DataError(f"no such file or folder: {path}", "check data.source")
    near = get_close_matches(spec, NAMED, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return DataError(
        f"{spec!r} is neither a path nor the name of a data set", f"{hint}names are {', '.join(sorted(NAMED))}"
    )


def folder_splits(
    folder: Path, channels: int | None = None, spatial_dims: int | None = None, progress: Progress | None = None
) -> dict[str, Source]:
    """The splits of a folder of images, nested or flat; of one without images, those of its parquet, tar or .npy files.

    A folder that holds train (or training) with images is read as splits: that one, val (or valid, validation) and
    test; what lies beside them is not used. Any other folder is all training data.

    Sub-folders are classes where every image of a split lies in one and there are two or more: the label is the
    first folder under the split. Shards (00/, 01/, ...) look the same and become classes too, which matters to
    nobody but the kNN figure. Hidden files are passed over, links to folders followed, each folder read once. Images
    are in the order of their paths, byte by byte.

    Args:
        folder: an existing folder.
        channels: 1 or 3; None: what each file has.
        spatial_dims: how many axes of an array are spatial, as in `ArraySource`.
        progress: told how far indexing shards and unpacking parquet files are.

    Raises:
        DataError: nothing of that in it; what was there instead.
    """
    check_channels(channels)
    listing = list_images(folder)
    if not len(listing.names):
        return _other_splits(folder, listing.others, channels, spatial_dims, progress)
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
        splits[split] = FileSource(folder, names, labels, None if labels is None else own, channels)
    return splits


class _Run(NamedTuple):
    """Images that follow each other in a listing and lie in one folder: where they start, how many, the folder."""

    start: int
    size: int
    parts: list[str]


def _class_names(runs: Sequence[_Run], depth: int) -> list[str] | None:
    """The folder at `depth` of each run; None unless every image lies in one there."""
    return [run.parts[depth] for run in runs] if all(len(run.parts) > depth for run in runs) else None


def _other_splits(
    folder: Path, others: Counter[str], channels: int | None, spatial_dims: int | None, progress: Progress | None
) -> dict[str, Source]:
    """The splits of a folder without images."""
    if others[".parquet"]:
        return table_splits(ParquetSource, sorted(folder.rglob("*.parquet")), channels, progress)
    if others[".tar"]:
        return table_splits(ShardSource, sorted(folder.rglob("*.tar")), channels, progress)
    if others[".npy"]:
        return npy_splits(folder, spatial_dims)
    most = sorted(others.items(), key=lambda item: (-item[1], item[0]))[:5]
    seen = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in most)
    found = f"holds no images, only {others.total()} other files ({seen})" if others else "is empty"
    raise DataError(f"{folder} {found}", _ACCEPTED)


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


def list_images(folder: Path) -> Listing:
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
        suffix = os.path.splitext(os.fsdecode(entry.rpartition(b"/")[2]))[1].lower()  # noqa: PTH122 (a Path is slow)
        if suffix not in IMAGE_SUFFIXES:
            others[suffix] += 1
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

    def __call__(self, files: Sequence[Place], channels: int | None, progress: Progress | None, /) -> Source:
        """Opens it."""


def table_splits(
    opener: _Opener, files: Sequence[Place], channels: int | None = None, progress: Progress | None = None
) -> dict[str, Source]:
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
    return {split: opener(members, channels, progress) for split, members in groups.items()}


def npy_splits(folder: Path, spatial_dims: int | None = None) -> dict[str, Source]:
    """The splits of a folder of .npy files named as the arrays of an .npz file, with the classes in classes.txt.

    Raises:
        DataError: no images.npy or train_images.npy among them.
    """
    names = folder / CLASSES_FILE
    classes = names.read_text(encoding="utf-8", errors="replace").splitlines() if names.is_file() else None
    splits: dict[str, Source] = {}
    for prefix, split in PREFIXES:
        images, labels = folder / f"{prefix}images.npy", folder / f"{prefix}labels.npy"
        if images.is_file():
            splits[split] = ArraySource(
                map_array(images),
                map_array(labels) if labels.is_file() else None,
                classes,
                title=images.name,
                spatial_dims=spatial_dims,
                file=images,
            )
    if "train" not in splits:
        raise DataError(f"{folder} holds .npy files, none of them images.npy", "give the path of one of them")
    return splits


def npz_splits(path: Path, spatial_dims: int | None = None, max_bytes: float | None = None) -> dict[str, Source]:
    """The splits of an .npz file: arrays `images` and `labels`, or train_images, val_images, test_images and so on.

    Args:
        path: the file.
        spatial_dims: as in `ArraySource`.
        max_bytes: that they may take in memory, where all of them are kept; None: as many as the machine has.

    Raises:
        DataError: it cannot be read, holds no images, or more than fit.
    """
    limit = memory_bytes() if max_bytes is None else max_bytes
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            wanted = [name for name in arrays.files if name.endswith(("images", "labels"))]
            if (needed := unpacked_bytes(arrays, wanted)) > limit:
                raise DataError(
                    f"{path} unpacks to {needed / 2**30:.1f} GiB and there are {limit / 2**30:.1f} GiB of memory",
                    "save its images as .npy, of which only what is needed is read",
                )
            held = {name: arrays[name] for name in wanted}
            # A member that is no array comes as bytes.
            held = {name: array for name, array in held.items() if isinstance(array, np.ndarray)}
            names = ", ".join(arrays.files)
    except DataError:
        raise
    except Exception as error:  # a damaged zip file fails as zlib, struct, zipfile or NumPy see fit
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())}", "save it with numpy.savez") from error
    splits: dict[str, Source] = {}
    for prefix, split in PREFIXES:
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
