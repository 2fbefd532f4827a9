from __future__ import annotations

import numpy as np
import pytest

from torchmae.data.arrays import ArraySource
from torchmae.data.sources import from_texts, in_one_list, in_training_classes, ordered_classes, read_labels


def source(labels: list[int] | None, classes: tuple[str, ...] | None = None) -> ArraySource:
    count = 3 if labels is None else len(labels)
    return ArraySource(np.zeros((count, 4, 4), np.uint8), labels, classes)


@pytest.mark.parametrize(
    ("labels", "classes", "trained", "names", "expected", "lost"),
    [
        ([0, 1, 2, -1], ("bee", "cat", "dog"), [0, 1, 2], ("ape", "cat", "bee"), [2, 1, -1, -1], "dog"),
        ([0, 1], ("a", "b"), [0, 0, 0], ("a", "b"), [0, -1], "b"),  # a name that training lists and has no image of
        ([0, 1, 7], None, [0, 1, 1], None, [0, 1, -1], "7"),
        ([0, 1], ("2", "10"), [2, 10], None, [2, 10], ""),  # folders called by number, beside plain numbers
        ([2, 10], None, [0, 1], ("2", "10"), [0, 1], ""),
        ([0, 1, 3], None, [0, 1], ("ape", "bee"), [0, 1, -1], "3"),
        ([0], ("ape",), [4], None, [-1], "ape"),
        ([-5, 0], None, [0], None, [-1, 0], ""),
    ],
)
def test_labels_count_in_the_classes_of_training(labels, classes, trained, names, expected, lost) -> None:
    fitted, notes = in_training_classes(source(labels, classes), source(trained, names), "val")
    assert fitted.labels.tolist() == expected
    assert fitted.classes == names
    assert (len(notes) == 1 and lost in notes[0]) if lost else not notes


def test_images_without_labels_stay_as_they_are() -> None:
    held_out = source([0, 1])
    assert in_training_classes(held_out, source(None), "val") == (held_out, ())
    assert in_training_classes(held_out, source([1, 0]), "val") == (held_out, ())
    assert in_training_classes(source(None), held_out, "val")[0].labels is None


@pytest.mark.parametrize(
    ("values", "labels", "classes", "says"),
    [
        ([3, 0, -1], [3, 0, -1], None, ""),
        ([[3], [0], [1]], [3, 0, 1], None, ""),
        ([3.0, np.nan, 1.0], [3, -1, 1], None, ""),
        ([True, False, True], [1, 0, 1], None, ""),
        (["dog", "", "cat"], [1, -1, 0], ("cat", "dog"), ""),
        (np.array([b"10", b"9", b"-1"]), [10, 9, -1], None, ""),
        (np.array(["b", "a", "b"], dtype=object), [1, 0, 1], ("a", "b"), ""),
        ([[0, 1], [1, 0], [0, 1]], [1, 0, 1], None, "one class an image"),
        ([10**12, 7, -1], [1, 0, -1], ("7", str(10**12)), ""),  # identifiers, not a million million classes
        ([[0, 1, 1], [0, 0, 0], [1, 1, 1]], None, None, "several classes an image"),
        ([0.5, 1.0, 2.0], None, None, "not used"),
        ([0, 1], None, None, "not used"),
        (np.zeros((3, 8, 8), int), None, None, "not used"),
        ([1 + 2j, 0, 0], None, None, "not used"),
    ],
)
def test_labels_of_any_shape(values, labels, classes, says: str) -> None:
    read = read_labels(values, 3)
    assert (None if read.labels is None else read.labels.tolist(), read.classes) == (labels, classes)
    assert says in read.note and bool(says) == bool(read.note)


def test_names_and_numbers_as_text() -> None:
    assert from_texts(["3.0", "", "-1", "1"]).labels.tolist() == [3, -1, -1, 1]
    named = from_texts(["dog", "-1", "ape", "cat"], training=["dog", "cat"])
    assert (named.labels.tolist(), named.classes) == ([1, -1, 2, 0], ("cat", "dog", "ape"))
    assert ordered_classes(["10", "9"], ["2"]) == ("9", "10", "2")
    assert ordered_classes(["10", "9", "x"]) == ("10", "9", "x")


def test_one_list_of_classes_for_all_splits() -> None:
    splits = {"train": source([0, 1], ("b", "c")), "val": source([0, 1, -1], ("a", "b")), "test": source([5])}
    joined = in_one_list(splits)
    assert joined["train"].classes == joined["val"].classes == ("b", "c", "a")
    assert joined["val"].labels.tolist() == [2, 0, -1]
    assert joined["test"] is splits["test"]
