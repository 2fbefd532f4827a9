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
    """Labels as they can be used."""

    labels: Labels | None  # (N,), -1 where unknown; None: they are no classes
    classes: tuple[str, ...] | None = None  # the name of each number, where there are names
    note: str = ""  # what was made of them where that is not plain


def read_labels(values: npt.ArrayLike, count: int) -> ReadLabels:
    """Labels of `count` images from an array: whole numbers, names, or a column for each class.

    Integers and floats without a fraction are numbers of classes; negative ones and NaN mean unknown. Text is names,
    "" unknown. (N, C) with a single 1 in each row is one class of C. Anything else (several classes an image, masks,
    measurements) is no class of an image: training does without it.
    """
    array = np.asarray(values)
    given = f"labels of shape {array.shape} and type {array.dtype}"
    array = array[:, 0] if array.shape == (count, 1) else array
    if array.shape == (count,):
        if array.dtype.kind in "USO":
            return from_texts(
                [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in array.tolist()]
            )
        numbers = np.where(np.isnan(array), -1, array) if array.dtype.kind == "f" else array
        if array.dtype.kind in "biuf" and (numbers == np.rint(numbers)).all() and (np.abs(numbers) < 2**53).all():
            return _from_numbers(numbers.astype(np.int64))
    is_table = array.ndim == 2 and len(array) == count and array.shape[1] > 1 and array.dtype.kind in "biuf"
    if is_table and np.isin(array, (0, 1)).all() and (array.sum(axis=1) == 1).all():
        return ReadLabels(array.argmax(axis=1).astype(np.int64), None, f"{given} are read as one class an image")
    return ReadLabels(None, None, f"{given} are not used: figures of classes need one number or name an image")


def from_texts(texts: Sequence[str], training: Iterable[str] | None = None) -> ReadLabels:
    """Labels that are all whole numbers as such, any others as names in the order of `ordered_classes`.

    "" and "-1" are unknown; `training` are the labels of training images, None: all are.
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
    """Names of classes in the order of their numbers: those of training images, then those that only others have.

    Names are sorted as text; names that are all numbers by value: 2 comes before 10.
    """
    first, later = set(training), set(others)
    key = int if all(name.isascii() and name.isdigit() for name in first | later) else str
    return (*sorted(first, key=key), *sorted(later - first, key=key))


def in_training_classes(source: Source, train: Source, what: str) -> tuple[Source, tuple[str, ...]]:
    """Held-out images with labels that are numbers of the training images' classes.

    Labels are matched by the names of their classes, or as numbers where one side has no names. What training lacks
    is unknown (-1), and counted in a note that calls the images `what`.
    """
    if source.labels is None or train.labels is None:
        return source, ()
    trained = set(np.unique(train.labels).tolist())
    number_of = {name: number for number, name in enumerate(train.classes or ())}
    different, inverse = np.unique(np.maximum(source.labels, -1), return_inverse=True)
    found = [_number_in(value, source.classes, number_of) for value in different.tolist()]
    numbers = np.array([number if number in trained else -1 for number in found], dtype=np.int64)
    lost = (different >= 0) & (numbers < 0)
    notes: tuple[str, ...] = ()
    if lost.any():
        names = [_class_name(value, source.classes) for value in different[lost][:_NAMED].tolist()]
        notes = (
            f"{int(lost[inverse].sum()):,} of {len(source):,} {what} images are left out of figures of classes: "
            f"training has no {', '.join(names)}{', ...' if lost.sum() > _NAMED else ''}",
        )
    labels = numbers[inverse]
    if source.classes == train.classes and np.array_equal(labels, source.labels):
        return source, notes
    return _with_labels(source, labels, train.classes), notes


def _class_name(number: int, classes: Sequence[str] | None) -> str:
    return classes[number] if classes is not None and number < len(classes) else str(number)


def _number_in(value: int, classes: Sequence[str] | None, number_of: Mapping[str, int]) -> int:
    """The number of a label among the classes of the training images; -1 where none is like it."""
    name = _class_name(value, classes)
    if value < 0 or name in number_of:
        return number_of.get(name, -1)
    if classes is None:  # numbers beside names, or among other numbers
        return -1 if number_of and all(map(str.isdigit, number_of)) else value
    return int(name) if not number_of and name.isascii() and name.isdigit() else -1


def in_one_list(splits: Mapping[str, Source]) -> dict[str, Source]:
    """The same splits with one list of classes, for a format that can hold no more than one."""
    named = [source.classes for source in splits.values() if source.classes is not None]
    if not named or all(names == named[0] for names in named):
        return dict(splits)
    training = splits["train"].classes or ()
    added = dict.fromkeys(name for names in named for name in names if name not in training)
    number_of = {name: number for number, name in enumerate((*training, *added))}
    joined = dict(splits)
    for split, source in splits.items():
        if source.classes is not None and source.labels is not None:
            table = np.array([*(number_of[name] for name in source.classes), -1], dtype=np.int64)
            joined[split] = _with_labels(source, table[np.maximum(source.labels, -1)], tuple(number_of))
    return joined


def _with_labels(source: Source, labels: Labels, classes: tuple[str, ...] | None) -> Source:
    same = copy.copy(source)
    same.labels, same.classes = labels, classes
    return same
