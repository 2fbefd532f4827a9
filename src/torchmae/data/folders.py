"""Folders of pictures: lists the files, and reads splits, classes and masks from the names of folders and files."""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from torchmae.data.formats import FORMATS, missing_extra, regular_file
from torchmae.data.items import Context
from torchmae.data.sources import FileSource, Source, Strings, ordered_classes
from torchmae.errors import DataError, printable, reason_of

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Words that name a split, in lower case."""

LIST_SUFFIXES = (".csv", ".tsv", ".txt", ".lst")  # lists of images

_PICTURES = r"images?|imgs?|pictures|jpegimages|leftimg8bit|inputs?"
_MASKS = (
    r"masks?|labels?|gts?|gtfine|gtcoarse|ground[-_ ]?truths?|annot(?:ation)?s?|seg(?:mentation)?s?(?:class|object)?"
    r"|seg(?:mentation)?[-_ ]?(?:maps?|masks?|labels?)|mattes?|(?:1st|2nd)_manual"
)
_SPLIT = re.compile(
    rf"(?:(?:{_PICTURES})[-_ ]?)?({'|'.join(SPLIT_NAMES)}|tr|ts)(?:[-_ ]?(?:\d{{1,4}}|set|split|data|{_PICTURES}))?"
)
_PICTURE_FOLDER = re.compile(rf"(?:{_PICTURES})(?:tr|ts)?", re.IGNORECASE)
_MASK_FOLDER = re.compile(rf"(?:(?P<of>.+?)[-_ ]?)??(?:{_MASKS})(?:tr|ts)?(?:[-_ ].+)?")
_MASK_FILE = re.compile(rf"(?P<of>.+?)[-_. ](?:{_MASKS})(?:[-_ ]?\d{{1,3}})?", re.IGNORECASE)
_MASK_FILE_BYTES = re.compile(rf"[-_. ](?:{_MASKS})(?:[-_ ]?\d{{1,3}})?\.".encode(), re.IGNORECASE)
_DEEPEST_SPLIT = 3  # largest number of folders above the one that names a split
_SYSTEM = re.compile(
    rb"__MACOSX.*|\$RECYCLE\.BIN|RECYCLER|RECYCLED|System Volume Information|lost\+found|LOST\.DIR|found\.\d{3}"
    rb"|@eaDir|#recycle|#snapshot|@Recycle|@Recently-Snapshot|Network Trash Folder|Temporary Items|\..*",
    re.IGNORECASE,
)
_LISTED = 5  # largest number of names in a remark


@dataclass
class Listing:
    """The image files under a folder."""

    names: Strings = field(default_factory=Strings)  # relative paths with "/", sorted byte by byte
    places: list[str] = field(default_factory=list)  # folders of images: "" for the folder itself, "a/b"
    place_of: array[int] = field(default_factory=lambda: array("i"))  # index in `places` of each name
    others: Counter[str] = field(default_factory=Counter)  # number of other files by suffix
    system: Counter[str] = field(default_factory=Counter)  # skipped hidden and system folders and pictures, by name
    unreadable: dict[str, str] = field(default_factory=dict)  # reason for each folder that cannot be read
    num_twins: int = 0  # images that differ from another only in the suffix
    twin: str = ""  # an example of them

    def remarks(self) -> list[str]:
        """What was skipped, a short phrase each."""
        found = [f"{self.kinds()} not used"] if self.others else []
        if self.system:
            count = self.system.total()
            found.append(f"{count:,} hidden or system files and folders ({shortened(self.system)}) passed over")
        for place, reason in list(self.unreadable.items())[:_LISTED]:
            found.append(f"folder {place} cannot be read ({reason}) and is passed over")
        if len(self.unreadable) > _LISTED:
            found.append(f"{len(self.unreadable) - _LISTED:,} more folders cannot be read and are passed over")
        return found

    def kinds(self) -> str:
        """The other files by suffix, as text, the most frequent first."""
        most = sorted(self.others.items(), key=lambda item: (-item[1], item[0]))
        shown = []
        for suffix, count in most[:_LISTED]:
            extra = missing_extra(suffix)
            shown.append(f"{count:,} {suffix or 'without suffix'}" + (f" (pip install '{extra}')" if extra else ""))
        more = sum(count for _, count in most[_LISTED:])
        return ", ".join([*shown, *([f"{more:,} more files"] if more else [])])


def shortened(names: Iterable[str]) -> str:
    """The first five names, sorted, and the number of the others."""
    ordered = sorted(printable(os.fsencode(name)) for name in names)
    return ", ".join(ordered[:_LISTED]) + (f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else "")


def list_images(folder: Path, suffixes: tuple[str, ...]) -> Listing:
    """Lists the images under a folder, following links, each folder once; DataError: the folder cannot be read."""
    listing, root = Listing(), os.fsencode(folder)
    visited: set[tuple[int, int]] = set()  # device and number of the folders listed so far
    found: list[bytes] = []

    def note_unreadable(error: OSError) -> None:
        place = os.path.relpath(error.filename, root)
        if place == b".":
            problem = f"cannot read folder {folder}: {error.strerror}"
            raise DataError(problem, "mend its permissions, or give another") from error
        listing.unreadable[printable(place)] = reason_of(error)

    for path, folders, files in os.walk(root, onerror=note_unreadable, followlinks=True):
        status = os.stat(path)  # noqa: PTH116 (a Path for each folder of a million is slow)
        if (status.st_dev, status.st_ino) in visited:  # a link to a parent, or a second link to the same folder
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        hidden = {name for name in (*folders, *files) if _SYSTEM.fullmatch(name)}
        passed = [os.fsdecode(name) for name in hidden]
        pictures = [name for name in passed if os.fsencode(name) in folders or name.lower().endswith(suffixes)]
        listing.system.update("._*" if name.startswith("._") else name for name in pictures)
        folders[:] = sorted((name for name in folders if name not in hidden), key=lambda name: name + b"/")
        place = path[len(root) :].strip(b"/")
        found += [place + b"/" + name if place else name for name in files if name not in hidden]
    number_of: dict[str, int] = {}  # the index of each place
    last, last_stem = b"", b""
    for entry in sorted(found):
        path, _, name = entry.rpartition(b"/")
        lower, stem = os.fsdecode(name).lower(), entry.rpartition(b".")[0]
        if not lower.endswith(suffixes):
            suffix = os.path.splitext(lower)[1]  # noqa: PTH122 (a Path is slow)
            suffix = ".nii.gz" if lower.endswith(".nii.gz") else suffix
            is_bare = not suffix or suffix[1:].isdigit()  # DICOM files are called IM0001, or by an identifier: 1.2.840
            suffix = FORMATS["dicom"].suffixes[0] if is_bare and _is_dicom(root + b"/" + entry) else suffix
            if suffix not in suffixes:
                listing.others[suffix] += 1
                continue
            stem = entry  # what stands behind its last dot is no suffix
        if stem == last_stem:
            listing.num_twins += 1
            listing.twin = listing.twin or printable(last.rpartition(b"/")[2] + b", ." + name.rpartition(b".")[2])
        last, last_stem = entry, stem
        listing.names.add(entry)
        listing.place_of.append(number_of.setdefault(os.fsdecode(path), len(number_of)))
    listing.places = list(number_of)
    return listing


def _is_dicom(path: bytes) -> bool:
    """Whether a file without a suffix is a DICOM file, but no directory of such."""
    with suppress(DataError), regular_file(Path(os.fsdecode(path))) as file:
        return file.read(132)[128:] == b"DICM" and not path.lower().endswith(b"/dicomdir")
    return False


def split_named(word: str) -> str:
    """The split that a folder's name means ("train2017", "Testing", "imagesTr"); "" for none."""
    match = _SPLIT.fullmatch(word.lower())
    if match is None or (match[1] in ("tr", "ts") and len(word) == 2):
        return ""
    return {"tr": "train", "ts": "test"}.get(match[1]) or SPLIT_NAMES[match[1]]


class Role(NamedTuple):
    """The role of the pictures directly in a folder."""

    split: str  # "train", "val" or "test"; "": outside the splits
    label: str | None  # the name of their class; None: no class
    masks: str = ""  # the folder of masks that they are in; "": they are no masks


def roles(places: Sequence[str]) -> list[Role]:
    """The role of each folder of pictures, from the names of all these folders ("" is the top).

    The first level with a train folder (below the top also with one for validation or test) names the splits; without
    such a level, all is training data. The class is the first folder below the split, or above it; folders such as
    `images` do not count. Masks are in a folder such as `masks` or `train_masks` beside a folder of pictures.
    """
    folders = [tuple(place.split("/")) if place else () for place in places]
    direct = set(folders)
    children: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for parts in direct:
        for level, name in enumerate(parts):
            children[parts[:level]].add(name)

    def mask_folder(parts: tuple[str, ...]) -> str:
        for level, name in enumerate(parts):
            if _holds_masks(name, children[parts[:level]], has_pictures=parts[:level] in direct):
                return "/".join(parts[: level + 1])
        return ""

    masks = {parts: mask_folder(parts) for parts in direct}
    pictures = {parts for parts in direct if not masks[parts]}
    depth = next((depth for depth in range(_DEEPEST_SPLIT + 1) if _splits_at(depth, pictures)), None)
    splits = {parts: "train" if depth is None else _word_at(parts, depth) for parts in pictures}
    labels = _labels({parts: split for parts, split in splits.items() if split}, depth, has_masks=any(masks.values()))
    return [Role(splits.get(parts, ""), labels.get(parts), masks[parts]) for parts in folders]


def _word_at(parts: tuple[str, ...], depth: int) -> str:
    return split_named(parts[depth]) if len(parts) > depth else ""


def _splits_at(depth: int, pictures: Iterable[tuple[str, ...]]) -> bool:
    words = {_word_at(parts, depth) for parts in pictures}
    in_pictures = all(_PICTURE_FOLDER.fullmatch(name) for parts in pictures for name in parts[:depth])
    return "train" in words and (in_pictures or bool(words & {"val", "test"}))


def _holds_masks(name: str, siblings: Iterable[str], *, has_pictures: bool) -> bool:
    """Whether a folder has the name of a folder of masks and is beside (or below) the pictures of these masks."""
    match = _MASK_FOLDER.fullmatch(name.lower())
    if match is None:
        return False
    others = {other.lower() for other in siblings if other != name}
    of = match["of"]
    if of is None:
        return has_pictures or any(_PICTURE_FOLDER.fullmatch(other) or split_named(other) for other in others)
    same_split = {other for other in others if split_named(of) and split_named(other) == split_named(of)}
    pictures = re.compile(rf"{re.escape(of)}(?:[-_ ]?(?:{_PICTURES}))?")
    return bool(same_split) or any(map(pictures.fullmatch, others))


def _labels(splits: dict[tuple[str, ...], str], depth: int | None, *, has_masks: bool) -> dict[tuple[str, ...], str]:
    """The class of the pictures in each folder; a split with pictures outside class folders has no classes."""
    rest = {parts: [*parts] for parts in splits}
    if depth is not None:
        common = len({parts[:depth] for parts in splits}) == 1
        rest = {parts: [*(() if common else parts[:depth]), *parts[depth + 1 :]] for parts in splits}
    if (depth is not None or has_masks) and all(any(map(_PICTURE_FOLDER.fullmatch, parts)) for parts in splits):
        rest = {parts: [name for name in kept if not _PICTURE_FOLDER.fullmatch(name)] for parts, kept in rest.items()}
    without = {splits[parts] for parts, kept in rest.items() if not kept}
    return {parts: kept[0] for parts, kept in rest.items() if splits[parts] not in without}


def masks_among(names: Strings) -> list[int]:
    """The indices of pictures that are masks of others by their file names: x_mask.png beside x.jpg."""
    if not _MASK_FILE_BYTES.search(names.parts[0]):
        return []
    stems = [os.fsdecode(name).rpartition(".")[0] for name in names]
    known = set(stems)
    folders = ((stem.rpartition("/")[0], _MASK_FILE.fullmatch(stem.rpartition("/")[2])) for stem in stems)
    return [i for i, (folder, match) in enumerate(folders) if match and f"{folder}/{match['of']}".lstrip("/") in known]


class Masks:
    """The masks of a data set, by their paths relative to its folder; `of` finds the mask of a picture.


    `pictures` are the paths of the pictures, in the order of their masks; None: those with the mask's folder and stem.
    """

    def __init__(self, root: Path, names: Strings, pictures: Strings | None = None) -> None:
        self._root = root
        self._names = names
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._names)

    def _key(self, name: str) -> tuple[str, ...]:
        return _pair_key(name) if self._pictures is None else (str(self._root / name),)

    @cached_property
    def _by_key(self) -> dict[tuple[str, ...], int]:
        known = self._names if self._pictures is None else self._pictures
        return {self._key(os.fsdecode(known[i])): i for i in reversed(range(len(self)))}

    def of(self, picture: str | Path) -> Path | None:
        """The mask (the first of several) of a picture, whose path is absolute or relative to the root; else None."""
        found = self._by_key.get(self._key_of(picture))
        return None if found is None else self._root / os.fsdecode(self._names[found])

    def alone(self, pictures: Iterable[str]) -> list[Path]:
        """The masks of none of these pictures."""
        used = {self._key_of(picture) for picture in pictures}
        return [self._root / os.fsdecode(self._names[i]) for key, i in self._by_key.items() if key not in used]

    def _key_of(self, picture: str | Path) -> tuple[str, ...]:
        path = Path(picture)
        key = self._key((path.relative_to(self._root) if path.is_relative_to(self._root) else path).as_posix())
        # MVTec AD: ground_truth/KIND/x_mask.png is of test/KIND/x.png.
        is_below_split = key not in self._by_key and len(key) > 2 and split_named(key[0])
        return key[1:] if is_below_split else key


def _pair_key(name: str) -> tuple[str, ...]:
    """The common part of the paths of a picture and its mask: the stem, and folders not named for either."""
    path = PurePosixPath(name)
    parts: list[str] = []
    for part in path.parts[:-1]:
        word = part.lower()
        mask = _MASK_FOLDER.fullmatch(word)
        if mask is not None and mask["of"] is not None:
            parts.append(split_named(mask["of"]) or mask["of"])
        elif mask is None and not _PICTURE_FOLDER.fullmatch(word):
            parts.append(split_named(word) or word)
    match = _MASK_FILE.fullmatch(path.stem)
    return (*parts, match["of"] if match else path.stem)


def picture_splits(folder: Path, listing: Listing, context: Context) -> dict[str, Source]:
    """The splits of a listed folder, with classes and masks."""
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
    """What was decided about a folder and what is not used, a short phrase each."""
    place_of = np.frombuffer(listing.place_of, dtype=np.intc)
    masks_in, images_in = (np.bincount(place_of[rows], minlength=len(found)) for rows in (is_mask, ~is_mask))
    counts: Counter[str] = Counter()  # number of pictures by split; "" outside the splits
    for role, count in zip(found, images_in.tolist(), strict=True):
        counts[role.split] += count
    names = [split for split in ("train", "val", "test") if counts[split]]
    remarks = [f"splits {'/'.join(names)} found"] if len(names) > 1 or counts[""] else []
    if num_classes:
        remarks.append(f"labels from folders ({num_classes} classes)")
    tops = {place: place.partition("/")[0] for place in listing.places}
    if names == ["train"]:
        files = (f"{split}{suffix}" for split in SPLIT_NAMES for suffix in LIST_SUFFIXES)
        if lists := [name for name in files if (folder / name).is_file()]:
            remarks.append(f"lists {', '.join(lists)} not used, so that all images are trained on")
        held_out = sorted({top for top in tops.values() if split_named(top) in ("val", "test")})
        remarks += [f"no train folder, so {top}/ is trained on" for top in held_out]
    if counts[""]:
        beside = {f"{tops[place] or '.'}/" for place, role in zip(listing.places, found, strict=True) if not role.split}
        beside -= {f"{role.masks}/" for role in found}
        remarks.append(f"{counts['']:,} images beside the splits ({shortened(beside)}) not used")
    if is_mask.any():
        where = {f"{role.masks}/" if role.masks else "*_mask" for role, n in zip(found, masks_in, strict=True) if n}
        remarks.append(f"{int(is_mask.sum()):,} masks ({shortened(where)}) set apart")
    if listing.num_twins:
        remarks.append(
            f"{listing.num_twins:,} images share name and folder with another ({listing.twin}), and all are used; "
            f"for one kind only, give '{printable(os.fsencode(folder))}/**/*.SUFFIX'"
        )
    return [*remarks, *listing.remarks()]
