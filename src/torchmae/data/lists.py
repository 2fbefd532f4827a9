"""Lists of image files: patterns such as 'photos/**/*.jpg', and text files of paths and labels in many dialects."""

from __future__ import annotations

import codecs
import csv
import glob
import itertools
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from torchmae.data.formats import FORMATS, Context, picture_suffixes
from torchmae.data.labels import from_texts
from torchmae.data.remote import expand_braces
from torchmae.data.sources import FileSource, Source, printable, spread
from torchmae.data.strings import Strings, StringsWriter, join_strings, pack_strings
from torchmae.errors import DataError
from torchmae.paths import user_path

PATH_COLUMNS = (
    *("path", "file", "filename", "file_name", "filepath", "file_path", "image", "img", "image_path", "img_path"),
    *("image_name", "img_name", "image_file", "image_filename", "relative_path", "picture", "photo", "name"),
)
LABEL_COLUMNS = (
    *("label", "class", "target", "labels", "category", "class_name", "label_name", "classname", "class_id"),
    *("label_id", "category_id", "diagnosis", "species", "y"),
)
SPLIT_COLUMNS = ("split", "subset", "partition", "set", "phase")

_MAX_LINE = 2**16  # characters in a field
_SAMPLE = 200  # lines from which the dialect is told
_SAMPLE_BYTES = 2**20
_TRIED = 20  # paths that are looked for
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars", " ": "spaces"}
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def is_pattern(spec: str) -> bool:
    """Whether a data source is a pattern of file names."""
    return any(character in spec for character in "*?[{")


def matching(pattern: str) -> list[Path]:
    """The files that a pattern with *, ?, [...], ** (any folders) and {a,b} matches, sorted; hidden ones left out.

    Raises:
        DataError: none.
    """
    expanded = str(user_path(pattern))
    # Unlike Path.glob, this takes absolute patterns and leaves hidden files out.
    found = {file for part in expand_braces(expanded) for file in glob.iglob(part, recursive=True)}  # noqa: PTH207
    files = [Path(file) for file in sorted(found) if Path(file).is_file()]
    if not files:
        raise DataError(f"no file matches {pattern}", "check the pattern, and quote it so that the shell leaves it be")
    return files


def pattern_source(pattern: str, files: list[Path], context: Context) -> FileSource:
    """The image files among those that a pattern matches.

    Raises:
        DataError: there are none.
    """
    names = [str(file) for file in files if file.suffix.lower() in picture_suffixes()]
    if not names:
        raise DataError(
            f"{pattern} matches no images, only files such as {files[0]}",
            f"accepted are {', '.join(picture_suffixes())}",
        )
    others = len(files) - len(names)
    return FileSource(Path(), names, context=context, remarks=[f"{others:,} other files not used"] if others else ())


def list_splits(path: Path, splits: Mapping[str, str], context: Context) -> dict[str, Source]:
    """The images of a text file with the path of one on each line, and a label and a split where there are any.

    The dialect is told from the first lines: the encoding, what separates columns (, ; | tab, or a space before the
    label), whether the first line names the columns, which column holds paths. The label is the column called label,
    class, target or the like, without names the one that follows the path; a column called split says the split.
    Paths are relative to the file's own folder, else to the working folder; backslashes are separators; of paths of
    another computer, the end that exists below the file's folder counts. Labels are as in `labels.from_texts`.

    Args:
        path: the file.
        splits: what names in the split column mean.
        context: how the images are read.

    Raises:
        DataError: it cannot be read, has no rows, or a row without a path or of an unknown split; with its line.
    """
    csv.field_size_limit(_MAX_LINE)
    try:
        encoding = _encoding(path)
        dialect = _dialect(path, encoding, set(splits))
        with path.open(encoding=encoding, errors="surrogateescape", newline="") as file:
            reader = _reader(file, dialect.separator)
            try:
                rows = _read(reader, dialect, splits)
            except DataError as error:
                raise DataError(f"{path}, line {reader.line_num}: {error.problem}", error.fix) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (csv.Error, UnicodeError) as error:
        raise DataError(f"{path} is not a list: {error}", "write one path and label a line, as UTF-8") from error
    if "train" not in rows.names:
        raise DataError(f"{path} has no rows of the train split", "write the path of an image on each line")
    found_names = {split: names.finish() for split, names in rows.names.items()}
    root, found_names, remarks = _located(path, found_names)
    if encoding not in ("utf-8", "utf-8-sig"):
        remarks.insert(0, f"{path.name} read as {encoding}")
    places = {split: np.frombuffer(labels, dtype=np.intc) for split, labels in rows.labels.items()}
    trained = {rows.texts[place] for place in np.unique(places["train"])}
    numbers, classes, note = from_texts(rows.texts, trained)
    remarks += [*dialect.remarks, *([note] if note else [])]
    found: dict[str, Source] = {}
    for split, names in found_names.items():
        labels = numbers[places[split]] if dialect.label is not None and numbers is not None else None
        own = classes if classes is None or split != "train" else classes[: len(trained & set(classes))]
        found[split] = FileSource(root, names, labels, None if labels is None else own, context, remarks)
    return found


class _Dialect(NamedTuple):
    """How a list is written.

    Attributes:
        separator: of columns; "": each line is a path; " ": the last word of a line is the label.
        has_header: whether the first line names the columns.
        path: the column of paths.
        label: the column of labels, if there is one.
        split: the column of splits, if there is one.
        remarks: what was decided, a short phrase each.
    """

    separator: str
    has_header: bool
    path: int
    label: int | None
    split: int | None
    remarks: tuple[str, ...]


def _encoding(path: Path) -> str:
    """The encoding of a text file: by its first bytes, else UTF-8, else Windows' for western Europe."""
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


class _Reader(Protocol):
    """Rows of a list, as lists of cells; `line_num` lines were read."""

    line_num: int

    def __iter__(self) -> Iterator[list[str]]: ...

    def __next__(self) -> list[str]: ...


def _reader(file: Iterator[str], separator: str) -> _Reader:
    return _Lines(file, split=bool(separator)) if separator in ("", " ") else csv.reader(file, delimiter=separator)


class _Lines:
    """Lines without columns: a path, and if they are to be `split` a label behind it. No empty ones, no comments."""

    def __init__(self, file: Iterator[str], *, split: bool) -> None:
        self.line_num = 0
        self._file = file
        self._split = split

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        for line in self._file:
            self.line_num += 1
            text = line.strip()
            if not text or (text.startswith("#") and not _looks_like_path(text)):
                continue
            if self._split:
                name, _, label = text.rpartition(" ")
                if _looks_like_path(name) and not _looks_like_path(text):
                    return [name.strip().strip("\"'"), label]
            return [text.strip('"') if text.startswith('"') else text]
        raise StopIteration


def _looks_like_path(cell: str) -> bool:
    return cell.strip().strip("\"'").lower().endswith(_all_suffixes())


def _all_suffixes() -> tuple[str, ...]:
    return tuple(suffix for form in FORMATS.values() for suffix in form.suffixes)


def _dialect(path: Path, encoding: str, split_words: set[str]) -> _Dialect:
    """How a list is written, by its first lines."""
    with path.open(encoding=encoding, errors="surrogateescape") as file:
        lines = [line for line in itertools.islice(file, _SAMPLE) if line.strip()]
    suffix = path.suffix.lower()
    separator = _separator(lines, "\t" if suffix == ".tsv" else "," if suffix == ".csv" else "")
    rows = [row for row in _reader(iter(lines), separator) if any(cell.strip() for cell in row)]
    if not rows:
        return _Dialect(separator, False, 0, None, None, ())
    first = [cell.strip().lower() for cell in rows[0]]
    width = len(first)
    like = Counter(i for row in rows for i, cell in enumerate(row[:width]) if _looks_like_path(cell))
    by_look = max(range(width), key=lambda i: (like[i], -i))
    by_name = next((first.index(name) for name in PATH_COLUMNS if name in first), None)
    path_at = by_look if by_name is None or (like[by_look] and not like[by_name]) else by_name
    has_header = not _looks_like_path(rows[0][path_at]) and (by_name is not None or like[path_at] > 0)
    label = next((first.index(name) for name in LABEL_COLUMNS if name in first), None) if has_header else None
    split = _split_column(first, rows[1:], split_words) if has_header else None
    others = [i for i in range(width) if i not in (path_at, label, split) and not _is_index(i, rows[has_header:])]
    if label is None and not has_header and path_at + 1 < width:
        label = path_at + 1
    elif label is None and len(others) == 1 and by_name is None:
        label = others[0]
    remarks = []
    if separator not in ("", {".tsv": "\t", ".csv": ","}.get(suffix, "")):
        remarks.append(f"columns of {path.name} are separated by {_SEPARATORS[separator]}")
    if has_header and by_name is None:
        names = [rows[0][i].strip() for i in (path_at, *(() if label is None else (label,)))]
        columns = " and labels in ".join(map(repr, names))
        remarks.append(f"paths of {path.name} in the column {columns}")
    unused = [rows[0][i].strip() if has_header else f"column {i + 1}" for i in others if i != label]
    if unused:
        shown = printable(", ".join(unused[:5]).encode("utf-8", "surrogateescape"))
        remarks.append(f"{len(unused)} columns of {path.name} not used ({shown}{', ...' if len(unused) > 5 else ''})")
    return _Dialect(separator, has_header, path_at, label, split, tuple(remarks))


def _separator(lines: Sequence[str], usual: str) -> str:
    """What separates columns: with what most lines have a cell that looks like a path, and a second one."""

    def fit(separator: str) -> tuple[int, int]:
        rows = [row for row in _reader(iter(lines), separator) if row]
        return sum(len(row) > 1 and any(map(_looks_like_path, row)) for row in rows), separator == usual

    whole = sum(map(_looks_like_path, lines))
    best = max(_SEPARATORS, key=fit)
    if usual == "" and fit(best)[0] <= whole:
        return ""
    return best if fit(best)[0] > len(lines) // 2 else usual


def _split_column(first: Sequence[str], rows: Sequence[Sequence[str]], words: set[str]) -> int | None:
    """The column of splits: one called so, or called otherwise and holding nothing else."""
    for name in SPLIT_COLUMNS:
        if name in first:
            at = first.index(name)
            if name == SPLIT_COLUMNS[0] or all(row[at].strip().lower() in words for row in rows if at < len(row)):
                return at
    return None


def _is_index(column: int, rows: Sequence[Sequence[str]]) -> bool:
    """Whether a column counts the rows, as pandas writes it."""
    cells = [row[column].strip() for row in rows if column < len(row)]
    return all(cell.isdigit() for cell in cells) and [int(cell) for cell in cells] in (
        list(range(len(cells))),
        list(range(1, len(cells) + 1)),
    )


class _Table(NamedTuple):
    """What a list holds.

    Attributes:
        names: the paths of each split.
        labels: the labels of each split, as places in `texts`.
        texts: the different texts in the column of labels, "" first.
    """

    names: dict[str, StringsWriter]
    labels: dict[str, array[int]]
    texts: list[str]


def _read(reader: _Reader, dialect: _Dialect, splits: Mapping[str, str]) -> _Table:
    """Reads all rows. A loop for millions of them: every row costs a microsecond or two, and leaves nothing behind."""
    name_at, label_at, split_at = dialect.path, dialect.label, dialect.split
    names: dict[str, StringsWriter] = {}
    labels: dict[str, array[int]] = {}
    place_of = {"": 0}
    if dialect.has_header:
        next((row for row in reader if row), None)
    for row in reader:
        if not row:
            continue
        name = row[name_at].strip() if name_at < len(row) else ""
        if not name:
            raise DataError("no path", "write the path of an image there")
        split = row[split_at].strip() if split_at is not None and split_at < len(row) else ""
        if split and split.lower() not in splits:
            raise DataError(f"the split is {split!r}", f"choose from {', '.join(sorted(set(splits)))}")
        group = splits[split.lower()] if split else "train"
        if group not in names:
            names[group], labels[group] = StringsWriter(), array("i")
        names[group].add(name.encode("utf-8", "surrogateescape"))
        label = row[label_at].strip() if label_at is not None and label_at < len(row) else ""
        labels[group].append(place_of.setdefault(label, len(place_of)))
    return _Table(names, labels, list(place_of))


def _located(path: Path, names: dict[str, Strings]) -> tuple[Path, dict[str, Strings], list[str]]:
    """Where the paths of a list are: the folder that they are relative to, the paths, and what was decided."""
    every = join_strings(list(names.values()))
    tried = [os.fsdecode(every[int(i)]) for i in spread(len(every), _TRIED)]
    remarks: list[str] = []

    def exist(root: Path, candidates: Sequence[str]) -> bool:
        return any((root / name).is_file() for name in candidates)

    try:
        if exist(path.parent, tried):
            return path.parent, names, remarks
        if any("\\" in name for name in tried):
            names = {split: pack_strings(name.replace(b"\\", b"/") for name in part) for split, part in names.items()}
            tried = [name.replace("\\", "/") for name in tried]
            remarks.append(f"backslashes in {path.name} read as separators of folders")
        for root, where in ((path.parent, ""), (Path(), f"paths of {path.name} are relative to the working folder")):
            if exist(root, tried):
                return root, names, [*remarks, *([where] if where else [])]
        for count in range(1, max(name.count("/") for name in tried) + 1):
            if exist(path.parent, ["/".join(name.split("/")[count:]) for name in tried if name.count("/") >= count]):
                kept = {
                    split: pack_strings(b"/".join(n.split(b"/")[count:]) for n in part) for split, part in names.items()
                }
                return path.parent, kept, [*remarks, f"paths of {path.name} read without their first {count} folders"]
    except (OSError, ValueError):  # a null byte, or a name longer than the disk allows
        pass
    kind = "Windows' " if _DRIVE.match(tried[0]) else ""
    example = printable(os.fsencode(tried[0]))
    remarks.append(f"{len(tried)} {kind}paths of {path.name} were tried and none is there, such as {example}")
    return path.parent, names, remarks
