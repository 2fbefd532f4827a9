from __future__ import annotations

import numpy as np
import pytest

from torchmae.report.feature_pictures import class_name, map_picture

POINTS = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)


def colours(picture: object) -> set[tuple[int, ...]]:
    """Colours of more than a few nearly opaque pixels."""
    pixels = np.asarray(picture)
    values, counts = np.unique(pixels[pixels[..., 3] > 180][:, :3], axis=0, return_counts=True)
    return {tuple(int(x) for x in value) for value, count in zip(values, counts, strict=True) if count > 30}


def test_classes_have_colours_of_their_own() -> None:
    labels = np.arange(200) % 3
    picture = map_picture(POINTS, labels, ["cat", "dog", "ship"], "t-SNE")
    assert {(59, 125, 216), (224, 112, 44), (46, 155, 87)} <= colours(picture)
    assert (138, 146, 156) not in colours(picture)
    assert picture.mode == "RGBA" and picture.getpixel((0, 0))[3] == 0
    assert "200 images placed on a plane by t-SNE" in picture.info["Description"]
    assert picture.info["Description"].endswith("A point's colour is its class.")


@pytest.mark.parametrize("labels", [None, np.full(200, -1)])
def test_without_labels_all_are_grey(labels: np.ndarray | None) -> None:
    picture = map_picture(POINTS, labels, None, "PCA")
    pixels = np.asarray(picture)
    assert set(map(tuple, pixels[pixels[..., 3] > 140][:, :3].tolist())) == {(138, 146, 156)}
    assert "colour" not in picture.info["Description"]


def test_of_many_classes_the_commonest_are_in_colour() -> None:
    labels = np.concatenate([np.zeros(100, dtype=int), np.arange(1, 26).repeat(4)])
    picture = map_picture(POINTS, labels, None, "t-SNE")
    assert "its class, for the 20 commonest" in picture.info["Description"]


def test_the_same_points_give_the_same_picture() -> None:
    labels = np.arange(200) % 5
    first, second = (map_picture(POINTS, labels, None, "t-SNE").tobytes() for _ in range(2))
    assert first == second


def test_names_that_the_font_may_lack_become_numbers() -> None:
    classes = ["cat", "Käfer", "猫", "_private", ""]
    names = [class_name(label, classes) for label in range(6)]
    assert names == ["cat", "Käfer", "class 2", "class 3", "class 4", "class 5"]
    assert class_name(7, None) == "class 7"
    # Drawing warns of letters that are missing, and warnings are errors here.
    map_picture(POINTS, np.arange(200) % 5, classes, "t-SNE")
