"""Lists of image files: patterns such as 'photos/**/*.jpg', and text files with paths and labels in many dialects."""

from __future__ import annotations

import codecs
import csv
import glob
import itertools
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from torchmae.data.folders import SPLIT_NAMES, Masks
from torchmae.data.formats import FORMATS, picture_suffixes
from torchmae.data.items import Context
from torchmae.data.remote import expand_braces
from torchmae.data.sources import FileSource, Source, Strings, evenly_spaced, from_texts
from torchmae.errors import DataError, printable
from torchmae.paths import user_path

PATH_COLUMNS = (
    *("path", "file", "filename", "file_name", "filepath", "file_path", "image", "img", "image_path", "img_path"),
    *("image_name", "img_name", "image_file", "image_filename", "relative_path", "picture", "photo", "name"),
)
LABEL_COLUMNS = (
    *("label", "class", "target", "labels", "category", "class_name", "label_name", "classname", "class_id"),
    *("label_id", "category_id", "diagnosis", "species", "y"),
)
MASK_COLUMNS = ("mask", "mask_path", "mask_file", "segmentation", "annotation")
SPLIT_COLUMNS = ("split", "subset", "partition", "set", "phase")

_MAX_LINE = 2**16  # largest number of characters in a field
_SAMPLE = 200  # number of lines from which the dialect is detected
_SAMPLE_BYTES = 2**20
_TRIED = 20  # number of paths that are looked for
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars", " ": "spaces"}
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def matching(pattern: str) -> list[Path]:
    """The files that match a pattern with *, ?, [...], ** (any folders) and {a,b}, sorted; DataError: none."""
    # Unlike Path.glob, glob.iglob takes absolute patterns and skips hidden files.
    found = {file for part in expand_braces(str(user_path(pattern))) for file in glob.iglob(part, recursive=True)}  # noqa: PTH207
    files = [Path(file) for file in sorted(found) if Path(file).is_file()]
    if not files:
        raise DataError(f"no file matches {pattern}", "check the pattern, and quote it so that the shell leaves it be")
    return files


def pattern_source(pattern: str, files: list[Path], context: Context) -> FileSource:
    """The image files among the matches of a pattern; DataError: there are none."""
    known = picture_suffixes()
    names = [str(file) for file in files if file.suffix.lower() in known]
    if not names:
        problem = f"{pattern} matches no images, only files such as {files[0]}"
        raise DataError(problem, f"accepted are {', '.join(known)}")
    others = len(files) - len(names)
    return FileSource(Path(), names, context=context, remarks=[f"{others:,} other files not used"] if others else ())


def list_splits(path: Path, context: Context) -> dict[str, Source]:
    """The splits of a text file that has one image path per line, and perhaps a label and a split.

    The dialect is detected from the first lines: encoding, separator (, ; | tab, or a space before the label), header,
    column of paths. Labels (see `sources.from_texts`) are in a column with a name such as label, class or target;
    without a header, in the column after the path. Splits are in a column with a name such as split. Paths are relative
    to the file's folder, else to the working folder; backslashes are separators; of paths from another computer, the
    end that exists below the file's folder is used. DataError, with the line: unreadable, no path, an unknown split.
    """
    csv.field_size_limit(_MAX_LINE)
    names: dict[str, Strings] = {}
    masks: dict[str, Strings] = {}
    labels: dict[str, array[int]] = {}  # by split; indices of `place_of`
    groups: dict[str, list[str]] = {}
    place_of = {"": 0}
    try:
        encoding = _encoding(path)
        dialect = _dialect(path, encoding, context.group)
        with path.open(encoding=encoding, errors="surrogateescape", newline="") as file:
            rows = _rows(file, dialect.separator)
            for number, row in itertools.islice(rows, int(dialect.has_header), None):  # may be millions
                name = _cell(row, dialect.path)
                if not name:
                    raise DataError(f"{path}, line {number}: no path", "write the path of an image there")
                word = _cell(row, dialect.split) or "train"
                split = SPLIT_NAMES.get(word.lower())
                if split is None:
                    choices = ", ".join(sorted(SPLIT_NAMES))
                    raise DataError(f"{path}, line {number}: the split is {word!r}", f"choose from {choices}")
                if split not in names:
                    names[split], masks[split], labels[split], groups[split] = Strings(), Strings(), array("i"), []
                names[split].add(name.encode("utf-8", "surrogateescape"))
                masks[split].add(_cell(row, dialect.mask).encode("utf-8", "surrogateescape"))
                if dialect.group is not None:
                    groups[split].append(_cell(row, dialect.group))
                labels[split].append(place_of.setdefault(_cell(row, dialect.label), len(place_of)))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (csv.Error, UnicodeError) as error:
        raise DataError(f"{path} is not a list: {error}", "write one path and label a line, as UTF-8") from error
    if "train" not in names:
        raise DataError(f"{path} has no rows of the train split", "write the path of an image on each line")
    paired = {} if dialect.mask is None else {f"masks of {split}": part for split, part in masks.items()}
    root, located, remarks = _located(path, names | paired)
    if encoding not in ("utf-8", "utf-8-sig"):
        remarks.insert(0, f"{path.name} read as {encoding}")
    texts = list(place_of)
    trained = {texts[place] for place in set(labels["train"])}
    numbers, classes, note, tags = from_texts(texts, trained)
    remarks += [*dialect.remarks, *([note] if note else [])]
    found: dict[str, Source] = {}
    for split in names:
        texts_of = np.frombuffer(labels[split], np.intc)
        own = None if dialect.label is None or numbers is None else numbers[texts_of]
        known = classes[: int(own.max(initial=-1)) + 1] if classes and own is not None and split == "train" else classes
        found[split] = FileSource(root, located[split], own, None if own is None else known, context, remarks)
        if tags is not None:
            found[split].tags, found[split].classes = tags[texts_of], classes
        found[split].groups = np.array(groups[split]) if groups[split] else None
        if paired:
            found[split].masks = Masks(root, located[f"masks of {split}"], located[split])
    return found


def _cell(row: Sequence[str], column: int | None) -> str:
    return row[column].strip() if column is not None and column < len(row) else ""


class _Dialect(NamedTuple):
    """The format of a list: its separator, and the numbers of its columns."""

    separator: str  # "": each line is a path; " ": the last word of a line is the label
    has_header: bool = False
    path: int = 0
    label: int | None = None
    split: int | None = None
    mask: int | None = None
    group: int | None = None
    remarks: tuple[str, ...] = ()  # what was decided, a short phrase each


def _encoding(path: Path) -> str:
    """The encoding of a text file: UTF-16 by its first bytes, else UTF-8, else Windows-1252."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        head = file.read(4)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        if head[1::2] == b"\0\0" or head[::2] == b"\0\0":
            return "utf-16-le" if head[1:2] == b"\0" else "utf-16-be"
        file.seek(0)
        try:
            while chunk := file.read(_SAMPLE_BYTES):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            file.seek(0)
            lines = (line.strip() for line in file if not line.isascii())
            named = next((cell for line in lines for cell in re.split(rb"[,;|\t\"]", line) if not cell.isascii()), b"")
            return "utf-8" if os.path.lexists(os.path.join(os.fsencode(path.parent), named)) else "cp1252"  # noqa: PTH118
    return "utf-8-sig"


def _rows(lines: Iterable[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each non-empty row; if the separator is "" or " ", "#" begins a comment."""
    if separator not in ("", " "):
        reader = csv.reader(lines, delimiter=separator)
        yield from ((reader.line_num, row) for row in reader if row)
        return
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or (text.startswith("#") and not _looks_like_path(text)):
            continue
        name, _, label = text.rpartition(" ")
        if separator and _looks_like_path(name) and not _looks_like_path(text):
            yield number, [name.strip().strip("\"'"), label]
        else:
            yield number, [text.strip('"') if text.startswith('"') else text]


def _looks_like_path(cell: str) -> bool:
    suffixes = tuple(suffix for form in FORMATS.values() for suffix in form.suffixes)
    return cell.strip().strip("\"'").lower().endswith(suffixes)


def _dialect(path: Path, encoding: str, group: str | None) -> _Dialect:
    """Detects the dialect of a list from its first lines."""
    with path.open(encoding=encoding, errors="surrogateescape") as file:
        lines = [line for line in itertools.islice(file, _SAMPLE) if line.strip()]
    usual = {".tsv": "\t", ".csv": ","}.get(path.suffix.lower(), "")
    separator = _separator(lines, usual)
    rows = [row for _, row in _rows(lines, separator) if any(cell.strip() for cell in row)]
    if not rows:
        return _Dialect(separator)
    first = [cell.strip().lower() for cell in rows[0]]
    columns = range(len(first))
    like = Counter(i for row in rows for i, cell in enumerate(row[: len(first)]) if _looks_like_path(cell))
    by_look = max(columns, key=lambda i: (like[i], -i))
    by_name = next((first.index(name) for name in PATH_COLUMNS if name in first), None)
    path_at = by_look if by_name is None or (like[by_look] and not like[by_name]) else by_name
    has_header = not _looks_like_path(rows[0][path_at]) and (by_name is not None or like[path_at] > 0)
    label = next((first.index(name) for name in LABEL_COLUMNS if name in first), None) if has_header else None
    split = _split_column(first, rows[1:]) if has_header else None
    named_mask = next((first.index(name) for name in MASK_COLUMNS if has_header and name in first), None)
    mask = next((i for i in (named_mask, path_at + 1) if i is not None and i != path_at and like[i]), None)
    label = None if label == mask else label
    group_at = first.index(group.lower()) if has_header and group is not None and group.lower() in first else None
    used = (path_at, label, split, mask, group_at)
    others = [i for i in columns if i not in used and not _is_index(i, rows[has_header:])]
    if label is None and not has_header and path_at + 1 < len(first) and mask is None:
        label = path_at + 1
    elif label is None and len(others) == 1 and by_name is None:
        label = others[0]
    remarks = []
    if separator not in ("", usual):
        remarks.append(f"columns of {path.name} are separated by {_SEPARATORS[separator]}")
    if has_header and by_name is None:
        names = [rows[0][i].strip() for i in (path_at, *(() if label is None else (label,)))]
        remarks.append(f"paths of {path.name} in the column {' and labels in '.join(map(repr, names))}")
    if mask is not None:
        remarks.append(f"masks of {path.name} (column {rows[0][mask].strip() if has_header else mask + 1}) set apart")
    unused = [rows[0][i].strip() if has_header else f"column {i + 1}" for i in others if i != label]
    if unused:
        shown = printable(", ".join(unused[:5])) + (", ..." if len(unused) > 5 else "")
        remarks.append(f"{len(unused)} columns of {path.name} not used ({shown})")
    return _Dialect(separator, has_header, path_at, label, split, mask, group_at, tuple(remarks))


def _separator(lines: Sequence[str], usual: str) -> str:
    """The separator with which most lines have at least two cells, one of them a path; else `usual`."""

    def fit(separator: str) -> tuple[int, int]:
        rows = [row for _, row in _rows(lines, separator)]
        return sum(len(row) > 1 and any(map(_looks_like_path, row)) for row in rows), separator == usual

    best = max(_SEPARATORS, key=fit)
    needed = max(len(lines) // 2, 0 if usual else sum(map(_looks_like_path, lines)))
    return best if fit(best)[0] > needed else usual


def _split_column(first: Sequence[str], rows: Sequence[Sequence[str]]) -> int | None:
    """The column of splits: the one named "split", or another of `SPLIT_COLUMNS` that holds only names of splits."""
    for at in (first.index(name) for name in SPLIT_COLUMNS if name in first):
        if first[at] == SPLIT_COLUMNS[0] or all(_cell(row, at).lower() in SPLIT_NAMES for row in rows if at < len(row)):
            return at
    return None


def _is_index(column: int, rows: Sequence[Sequence[str]]) -> bool:
    """Whether a column counts the rows, like an index that pandas writes."""
    cells = [row[column].strip() for row in rows if column < len(row)]
    counts = list(map(str, range(len(cells) + 1)))
    return cells in (counts[:-1], counts[1:])


def _located(path: Path, names: dict[str, Strings]) -> tuple[Path, dict[str, Strings], list[str]]:
    """Finds the files of a list: the folder, their paths relative to it, and remarks about what was decided."""
    tried = [part[int(i)] for part in names.values() for i in evenly_spaced(len(part), _TRIED)]
    remarks: list[str] = []

    def found(root: Path, without: int = 0) -> bool:
        """Whether any of the paths, without their first `without` folders, exists below a folder."""
        ends = (b"/".join(name.split(b"/")[without:]) for name in tried)
        return any(end and os.path.isfile(os.path.join(os.fsencode(root), end)) for end in ends)  # noqa: PTH113, PTH118

    try:
        if not found(path.parent) and any(b"\\" in name for name in tried):
            names = {split: Strings(name.replace(b"\\", b"/") for name in part) for split, part in names.items()}
            tried = [name.replace(b"\\", b"/") for name in tried]
            remarks.append(f"backslashes in {path.name} read as separators of folders")
        if found(path.parent):
            return path.parent, names, remarks
        if found(Path()):
            return Path(), names, [*remarks, f"paths of {path.name} are relative to the working folder"]
        for count in range(1, max(name.count(b"/") for name in tried) + 1):
            if found(path.parent, count):
                kept = {split: Strings(b"/".join(n.split(b"/")[count:]) for n in part) for split, part in names.items()}
                return path.parent, kept, [*remarks, f"paths of {path.name} read without their first {count} folders"]
    except (OSError, ValueError):  # a null byte, or a name that is too long for the disk
        pass
    kind = "Windows' paths" if _DRIVE.match(os.fsdecode(tried[0])) else "paths"
    remarks.append(f"none of {len(tried)} {kind} of {path.name} exists, such as {printable(tried[0])}")
    return path.parent, names, remarks
