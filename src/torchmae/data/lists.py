"""Lists of image files: patterns such as 'photos/**/*.jpg', text files of paths, CSV files of paths and labels."""

from __future__ import annotations

import csv
import glob
import itertools
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from torchmae.data.formats import Context, picture_suffixes
from torchmae.data.labels import from_texts
from torchmae.data.remote import expand_braces
from torchmae.data.sources import FileSource, Source
from torchmae.data.strings import StringsWriter
from torchmae.errors import DataError

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")
LABEL_COLUMNS = ("label", "class", "target")
SPLIT_COLUMN = "split"

_MAX_LINE = 2**16  # characters in a field


def is_pattern(spec: str) -> bool:
    """Whether a data source is a pattern of file names."""
    return any(character in spec for character in "*?[{")


def matching(pattern: str) -> list[Path]:
    """The files that a pattern with *, ?, [...], ** (any folders) and {a,b} matches, sorted; hidden ones left out.

    Raises:
        DataError: none.
    """
    expanded = str(Path(pattern).expanduser())
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
    return FileSource(Path(), names, context=context)


def text_source(path: Path, context: Context) -> FileSource:
    """The images of a text file with a path on each line, relative to the file's own folder.

    Raises:
        DataError: it cannot be read, or has no lines.
    """
    names = StringsWriter()
    try:
        with path.open("rb") as file:
            for line in file:
                if name := line.strip():
                    names.add(name)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not len(names):
        raise DataError(f"{path} is empty", "write the path of an image on each line")
    return FileSource(path.parent, names.finish(), context=context)


def csv_splits(path: Path, splits: dict[str, str], context: Context) -> dict[str, Source]:
    """The images of a CSV file, a row each.

    A first row with a column called path (or file, filename, file_name, image) names the columns: also label (or
    class, target) and split. Without one, the first column is the path and the second, if any, the label. Paths are
    relative to the file's own folder. Labels that are all whole numbers are taken as they are, any others are class
    names, numbered in sorted order, those of training images first; an empty one and -1 mean unknown.

    Args:
        path: the file; .tsv means tabs.
        splits: what names in the split column mean.
        context: how the images are read.

    Raises:
        DataError: it cannot be read, has no rows, or a row without a path or of an unknown split; with its line.
    """
    csv.field_size_limit(_MAX_LINE)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            try:
                rows = _read(reader, splits)
            except DataError as error:
                raise DataError(f"{path}, line {reader.line_num}: {error.problem}", error.fix) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file: {error}", "write one path and label a line") from error
    if "train" not in rows.names:
        raise DataError(f"{path} has no rows of the train split", "write the path of an image on each line")
    places = {split: np.frombuffer(labels, dtype=np.intc) for split, labels in rows.labels.items()}
    trained = {rows.texts[place] for place in np.unique(places["train"])}
    numbers, classes, _ = from_texts(rows.texts, trained)
    found: dict[str, Source] = {}
    for split, names in rows.names.items():
        labels = numbers[places[split]] if rows.has_labels and numbers is not None else None
        own = classes if classes is None or split != "train" else classes[: len(trained & set(classes))]
        found[split] = FileSource(path.parent, names.finish(), labels, own if rows.has_labels else None, context)
    return found


class _Rows(NamedTuple):
    """What a CSV file holds.

    Attributes:
        names: the paths of each split.
        labels: the labels of each split, as places in `texts`.
        texts: the different texts in the column of labels, "" first.
        has_labels: whether there is such a column.
    """

    names: dict[str, StringsWriter]
    labels: dict[str, array[int]]
    texts: list[str]
    has_labels: bool


def _read(reader: Iterator[list[str]], splits: dict[str, str]) -> _Rows:
    """Reads all rows. A loop for millions of them: every row costs a microsecond or two, and leaves nothing behind."""
    first = next((row for row in reader if row), [])
    header = _header([cell.strip().lower() for cell in first])
    name_at, label_at, split_at = header or (0, 1 if len(first) > 1 else None, None)
    names: dict[str, StringsWriter] = {}
    labels: dict[str, array[int]] = {}
    place_of = {"": 0}
    for row in reader if header else itertools.chain([first], reader):
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
    return _Rows(names, labels, list(place_of), label_at is not None)


def _header(cells: list[str]) -> tuple[int, int | None, int | None] | None:
    """Where the columns of path, label and split are; None where the row names no column of paths."""
    found = [
        next((cells.index(name) for name in names if name in cells), None)
        for names in (PATH_COLUMNS, LABEL_COLUMNS, (SPLIT_COLUMN,))
    ]
    return None if found[0] is None else (found[0], found[1], found[2])
