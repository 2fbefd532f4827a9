"""What folders and files mean by their names: splits, classes, masks beside pictures, what systems leave behind."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from torchmae.data.strings import Strings

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""Words that mean a split, in lower case; case does not matter."""

_PICTURES = r"images?|imgs?|pictures|jpegimages|leftimg8bit|inputs?"
_MASKS = (
    r"masks?|labels?|gts?|gtfine|gtcoarse|ground[-_ ]?truths?|annot(?:ation)?s?|seg(?:mentation)?s?(?:class|object)?"
    r"|seg(?:mentation)?[-_ ]?(?:maps?|masks?|labels?)|mattes?|(?:1st|2nd)_manual"
)
_SPLIT = re.compile(
    rf"(?:(?:{_PICTURES})[-_ ]?)?({'|'.join(SPLIT_NAMES)}|tr|ts)(?:[-_ ]?(?:\d{{1,4}}|set|split|data|{_PICTURES}))?"
)
_PICTURE_FOLDER = re.compile(rf"(?:{_PICTURES})(?:tr|ts)?")
_MASK_FOLDER = re.compile(rf"(?:(?P<of>.+?)[-_ ]?)??(?:{_MASKS})(?:tr|ts)?(?:[-_ ].+)?")
_MASK_FILE = re.compile(rf"(?P<of>.+?)[-_. ](?:{_MASKS})(?:[-_ ]?\d{{1,3}})?", re.IGNORECASE)
_MASK_FILE_BYTES = re.compile(rf"[-_. ](?:{_MASKS})(?:[-_ ]?\d{{1,3}})?\.".encode(), re.IGNORECASE)
_DEEPEST_SPLIT = 3  # folders above the one that names a split
_SYSTEM = re.compile(
    rb"__MACOSX.*|\$RECYCLE\.BIN|RECYCLER|RECYCLED|System Volume Information|lost\+found|LOST\.DIR|found\.\d{3}"
    rb"|@eaDir|#recycle|#snapshot|@Recycle|@Recently-Snapshot|Network Trash Folder|Temporary Items|\..*",
    re.IGNORECASE,
)


def is_system_name(name: bytes) -> bool:
    """Whether a file or folder is hidden, or one that systems, cameras and network disks leave beside pictures."""
    return _SYSTEM.fullmatch(name) is not None


def split_named(word: str) -> str:
    """The split that the name of a folder means ("train2017", "Testing", "imagesTr"); "" for none."""
    match = _SPLIT.fullmatch(word.lower())
    if match is None or (match[1] in ("tr", "ts") and len(word) == 2):
        return ""
    return {"tr": "train", "ts": "test"}.get(match[1]) or SPLIT_NAMES[match[1]]


class Role(NamedTuple):
    """What the pictures that lie directly in a folder are.

    Attributes:
        split: "train", "val" or "test"; "": they lie beside the splits.
        label: the name of their class; None: they have none.
        masks: the folder of masks that they are in; "": they are no masks.
    """

    split: str
    label: str | None
    masks: str = ""


def roles(places: Sequence[str]) -> list[Role]:
    """What the pictures in folders are, by the names of all folders.

    Splits are named by the first level of folders at which there is a train folder, and below the top also a folder
    for validation or test. Without one, everything is training data. The class is the first folder below, or above,
    the split, folders such as `images` apart. Masks lie in a folder such as `masks` or `train_masks` beside one of
    pictures.

    Args:
        places: paths of folders that hold pictures, "" for the top.
    """
    folders = [tuple(place.split("/")) if place else () for place in places]
    direct = set(folders)
    children: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for parts in direct:
        for level, name in enumerate(parts):
            children[parts[:level]].add(name)
    masks = {
        (parent, name)
        for parent, names in children.items()
        for name in names
        if _holds_masks(parent, name, children, direct)
    }

    def mask_folder(parts: tuple[str, ...]) -> str:
        levels = (level for level, name in enumerate(parts) if (parts[:level], name) in masks)
        return next(("/".join(parts[: level + 1]) for level in levels), "")

    pictures = {parts for parts in direct if not mask_folder(parts)}
    depth = next((depth for depth in range(_DEEPEST_SPLIT + 1) if _splits_at(depth, pictures)), None)
    splits = {parts: "train" if depth is None else _word_at(parts, depth) for parts in pictures}
    labels = _labels({parts: split for parts, split in splits.items() if split}, depth, has_masks=bool(masks))
    return [Role(splits.get(parts, ""), labels.get(parts), mask_folder(parts)) for parts in folders]


def _word_at(parts: tuple[str, ...], depth: int) -> str:
    return split_named(parts[depth]) if len(parts) > depth else ""


def _splits_at(depth: int, pictures: Iterable[tuple[str, ...]]) -> bool:
    words = {_word_at(parts, depth) for parts in pictures}
    in_pictures = all(map(_is_picture_word, (name for parts in pictures for name in parts[:depth])))
    return "train" in words and (in_pictures or bool(words & {"val", "test"}))


def _holds_masks(
    parent: tuple[str, ...], name: str, children: dict[tuple[str, ...], set[str]], direct: set[tuple[str, ...]]
) -> bool:
    """Whether a folder holds masks: it is called so, and lies beside (or below) the pictures that they belong to."""
    match = _MASK_FOLDER.fullmatch(name.lower())
    if match is None:
        return False
    siblings = {other.lower() for other in children[parent] if other != name}
    of = match["of"]
    if of is None:
        return parent in direct or any(_PICTURE_FOLDER.fullmatch(other) or split_named(other) for other in siblings)
    split = split_named(of)
    return any(
        other == of
        or (split and split_named(other) == split)
        or re.fullmatch(rf"{re.escape(of)}[-_ ]?(?:{_PICTURES})", other)
        for other in siblings
    )


def _labels(splits: dict[tuple[str, ...], str], depth: int | None, *, has_masks: bool) -> dict[tuple[str, ...], str]:
    """The class of the pictures in each folder; none in a split where some lie in no folder of their own."""
    rest = {parts: [*parts] for parts in splits}
    if depth is not None:
        common = len({parts[:depth] for parts in splits}) == 1
        rest = {parts: [*(() if common else parts[:depth]), *parts[depth + 1 :]] for parts in splits}
    if (depth is not None or has_masks) and all(any(map(_is_picture_word, parts)) for parts in splits):
        rest = {parts: [name for name in kept if not _is_picture_word(name)] for parts, kept in rest.items()}
    without = {splits[parts] for parts, kept in rest.items() if not kept}
    return {parts: kept[0] for parts, kept in rest.items() if splits[parts] not in without}


def _is_picture_word(name: str) -> bool:
    return _PICTURE_FOLDER.fullmatch(name.lower()) is not None


def masks_among(names: Strings) -> list[int]:
    """Which of the pictures are masks of others by the name of the file: x_mask.png beside x.jpg.

    Args:
        names: their paths.
    """
    if not _MASK_FILE_BYTES.search(names.parts[0]):
        return []
    found: list[int] = []
    folders: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for index, name in enumerate(names):
        folder, _, file = name.decode("utf-8", "surrogateescape").rpartition("/")
        folders[folder].append((index, file.rpartition(".")[0]))
    for members in folders.values():
        stems = {stem for _, stem in members}
        matches = ((index, _MASK_FILE.fullmatch(stem)) for index, stem in members)
        found += [index for index, match in matches if match and match["of"] in stems]
    return sorted(found)


class Masks:
    """The masks that lie beside the pictures of a data set, to be found by the picture that each belongs to.

    Args:
        root: the folder of the data set.
        names: paths of the masks relative to it.
    """

    def __init__(self, root: Path, names: Strings) -> None:
        self._root = root
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def _by_key(self) -> dict[tuple[str, ...], int]:
        return {_pair_key(os.fsdecode(self._names[i])): i for i in reversed(range(len(self)))}

    def of(self, picture: str | Path) -> Path | None:
        """The mask of a picture, by its path below the root; the first one where it has several; None: it has none."""
        path = Path(picture)
        name = path.relative_to(self._root) if path.is_relative_to(self._root) else path
        found = self._by_key.get(_pair_key(name.as_posix()))
        return None if found is None else self._root / os.fsdecode(self._names[found])


def _pair_key(name: str) -> tuple[str, ...]:
    """What the paths of a picture and of its mask have in common: folders but those of either, and the stem."""
    path = PurePosixPath(name)
    parts: list[str] = []
    for part in path.parts[:-1]:
        word = part.lower()
        mask = _MASK_FOLDER.fullmatch(word)
        if mask is not None and mask["of"] is not None:
            parts.append(split_named(mask["of"]) or mask["of"])
        elif mask is None and not _is_picture_word(word):
            parts.append(split_named(word) or word)
    match = _MASK_FILE.fullmatch(path.stem)
    return (*parts, match["of"] if match else path.stem)
