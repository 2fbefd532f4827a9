"""Labels: numbers or names, whatever form they are stored in; classes come from the training images alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torchmae.data.sources import Source

Labels = npt.NDArray[np.int64]

_NUMBER = re.compile(r"-?\d{1,18}(\.0+)?")  # "3.0": a table with gaps turns whole numbers into floats
_MEASURED = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_UNKNOWN = {"", "-1"}
_LARGEST = 100_000  # number of a class; larger ones are identifiers, and are numbered in their order
_NAMED = 5  # classes that a note lists


class ReadLabels(NamedTuple):
    """Labels as they can be used.

    Attributes:
        labels: (N,) int64, -1 where unknown; None: they are none of classes.
        classes: the name of each number, where there are names.
        note: what was made of them, where that is not plain; else "".
    """

    labels: Labels | None
    classes: tuple[str, ...] | None = None
    note: str = ""


def read_labels(values: npt.ArrayLike, count: int) -> ReadLabels:
    """Labels of `count` images from an array: whole numbers, names, or a column for each class.

    Integers and floats without a fraction are numbers of classes; negative ones and NaN mean unknown. Text is names,
    "" unknown. (N, C) with a single 1 in each row is one class of C. Anything else (several classes an image, masks,
    measurements) is no class of an image: training does without it.
    """
    array = np.asarray(values)
    given = f"labels of shape {array.shape} and type {array.dtype}"
    if array.shape == (count, 1):
        array = array[:, 0]
    if array.shape == (count,):
        if array.dtype.kind in "USO":
            names = (
                name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in array.tolist()
            )
            return from_texts(list(names))
        if array.dtype.kind == "f":
            numbers = np.where(np.isnan(array), -1, array)
            if (numbers == np.rint(numbers)).all() and (np.abs(numbers) < 2**53).all():
                return _from_numbers(numbers.astype(np.int64))
        elif array.dtype.kind in "biu":
            return _from_numbers(array.astype(np.int64))
    is_table = array.ndim == 2 and len(array) == count and array.shape[1] > 1 and array.dtype.kind in "biuf"
    if is_table and np.isin(array, (0, 1)).all() and (array.sum(axis=1) == 1).all():
        return ReadLabels(array.argmax(axis=1).astype(np.int64), None, f"{given} are read as one class an image")
    return ReadLabels(None, None, f"{given} are not used: figures of classes need one number or name an image")


def from_texts(texts: Sequence[str], training: Iterable[str] | None = None) -> ReadLabels:
    """Labels that are all whole numbers as such, any others as names in the order of `ordered_classes`.

    "" and "-1" are unknown.

    Args:
        texts: the label of each image.
        training: those of training images; None: all are.
    """
    different, inverse = np.unique(np.array(texts, dtype=object), return_inverse=True)
    if all(text == "" or _NUMBER.fullmatch(text) for text in different):
        numbers = np.array([int(text.partition(".")[0] or -1) for text in different], dtype=np.int64)
        return _from_numbers(numbers[inverse])
    if all(text == "" or _MEASURED.fullmatch(text) for text in different):
        example = next(text for text in different if text)
        return ReadLabels(None, None, f"labels such as {example} are measurements and not used")
    names = set(different) - _UNKNOWN
    classes = ordered_classes(names if training is None else names & set(training), names)
    number_of = {**dict.fromkeys(_UNKNOWN, -1), **{name: i for i, name in enumerate(classes)}}
    return ReadLabels(np.array([number_of[name] for name in different], dtype=np.int64)[inverse], classes)


def _from_numbers(numbers: Labels) -> ReadLabels:
    numbers = np.maximum(numbers, -1)
    if numbers.max(initial=-1) <= _LARGEST:
        return ReadLabels(numbers)
    different, inverse = np.unique(numbers, return_inverse=True)
    unknown = int(different[0] < 0)
    return ReadLabels(inverse.astype(np.int64) - unknown, tuple(map(str, different[unknown:].tolist())))


def ordered_classes(training: Iterable[str], others: Iterable[str] = ()) -> tuple[str, ...]:
    """The names of classes in the order of their numbers: those of training images, then those that only others have.

    Names are sorted as text; names that are all numbers by value: 2 comes before 10.
    """
    first, later = set(training), set(others)
    if all(name.isascii() and name.isdigit() for name in first | later):
        return (*sorted(first, key=int), *sorted(later - first, key=int))
    return (*sorted(first), *sorted(later - first))


def class_name(number: int, classes: Sequence[str] | None) -> str:
    """The name of a class; its number where it has none."""
    return classes[number] if classes is not None and number < len(classes) else str(number)


def in_training_classes(source: Source, train: Source, what: str) -> tuple[Source, tuple[str, ...]]:
    """Held-out images with labels that count in the classes of the training images.

    Labels go together by the names of their classes, or as numbers where one of both has no names. What training
    lacks is unknown (-1).

    Args:
        source: the held-out images.
        train: the training images.
        what: to call the held-out images in the note ("val").

    Returns:
        the images; and a note on those whose class training lacks, if there are any.
    """
    if source.labels is None or train.labels is None:
        return source, ()
    trained = set(np.unique(train.labels).tolist())
    number_of = {name: number for number, name in enumerate(train.classes or ())}
    different, inverse = np.unique(np.maximum(source.labels, -1), return_inverse=True)
    numbers = np.full(len(different), -1, dtype=np.int64)
    for i, value in enumerate(different.tolist()):
        number = _number(value, source.classes, number_of)
        if value >= 0 and number in trained:
            numbers[i] = number
    labels = numbers[inverse]
    lost = (different >= 0) & (numbers < 0)
    notes: tuple[str, ...] = ()
    if lost.any():
        names = [class_name(value, source.classes) for value in different[lost][:_NAMED].tolist()]
        more = ", ..." if lost.sum() > _NAMED else ""
        notes = (
            f"{int(lost[inverse].sum()):,} of {len(source):,} {what} images are left out of figures of classes: "
            f"training has no {', '.join(names)}{more}",
        )
    if source.classes == train.classes and np.array_equal(labels, source.labels):
        return source, notes
    return _with_labels(source, labels, train.classes), notes


def _number(value: int, classes: Sequence[str] | None, number_of: Mapping[str, int]) -> int:
    """The number of a class among those of the training images; -1 where none is like it."""
    name = class_name(value, classes)
    if name in number_of:
        return number_of[name]
    if classes is None:  # numbers that count in names, or among other numbers
        return -1 if number_of and all(map(str.isdigit, number_of)) else value
    return int(name) if not number_of and name.isascii() and name.isdigit() else -1


def in_one_list(splits: Mapping[str, Source]) -> dict[str, Source]:
    """The same splits with one list of classes, for a place that can hold no more than one."""
    named = [source.classes for source in splits.values() if source.classes is not None]
    if not named or all(names == named[0] for names in named):
        return dict(splits)
    training = splits["train"].classes or ()
    added = dict.fromkeys(name for names in named for name in names if name not in training)
    number_of = {name: number for number, name in enumerate((*training, *added))}
    joined: dict[str, Source] = {}
    for split, source in splits.items():
        joined[split] = source
        if source.classes is not None and source.labels is not None:
            table = np.array([*(number_of[name] for name in source.classes), -1], dtype=np.int64)
            joined[split] = _with_labels(source, table[np.maximum(source.labels, -1)], tuple(number_of))
    return joined


def _with_labels(source: Source, labels: Labels, classes: tuple[str, ...] | None) -> Source:
    same = copy.copy(source)
    same.labels, same.classes = labels, classes
    return same
