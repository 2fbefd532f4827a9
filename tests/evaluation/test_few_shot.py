from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from torchmae.errors import ConfigError
from torchmae.evaluation import few_shot, knn
from torchmae.evaluation.scores import Labelled

CLASSES = ("cat", "dog", "owl")
LABELS = np.repeat([0, 1, 2], [20, 12, 8])


def test_a_draw_has_the_same_number_of_each_class_and_is_a_function_of_seed_and_number() -> None:
    first = few_shot.draw_images(LABELS, 5, seed=0, draw=0)
    assert np.bincount(LABELS[first]).tolist() == [5, 5, 5]
    assert len(set(first.tolist())) == 15
    np.testing.assert_array_equal(first, few_shot.draw_images(LABELS, 5, seed=0, draw=0))
    assert first.tolist() != few_shot.draw_images(LABELS, 5, seed=0, draw=1).tolist()
    assert first.tolist() != few_shot.draw_images(LABELS, 5, seed=1, draw=0).tolist()


def test_every_image_is_drawn_about_equally_often() -> None:
    counts = np.zeros(len(LABELS))
    for draw in range(400):
        counts[few_shot.draw_images(LABELS, 4, seed=0, draw=draw)] += 1
    expected = 400 * 4 / np.array([20, 12, 8])[LABELS]
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_the_figures_are_mean_and_deviation_over_draws() -> None:
    asked: list[Labelled] = []

    def classify(train: Labelled, test: Labelled, num_classes: int) -> dict[str, Tensor]:
        asked.append(train)
        wrong = torch.arange(len(test.labels)) < len(asked)  # one mistake more each time
        return {"probe": torch.where(wrong, (test.labels + 1) % num_classes, test.labels)[:, None]}

    train = Labelled(torch.arange(40.0)[:, None], torch.from_numpy(LABELS))
    test = Labelled(torch.zeros(10, 1), torch.arange(10) % 3)
    result = few_shot.measure(train, test, classify, classes=CLASSES, labels_per_class=4, draws=3)
    assert result.figures == pytest.approx({"probe": 80.0, "probe_std": 10.0})
    assert result.details["probe"]["draws"] == pytest.approx([90, 80, 70])
    assert [len(item.labels) for item in asked] == [12, 12, 12]
    assert few_shot.run(train, test, classify, classes=CLASSES, labels_per_class=4, draws=1)["probe_std"] == 0


def test_knn_with_fewer_images_than_neighbours() -> None:
    labels = torch.from_numpy(LABELS)
    train = Labelled(torch.eye(3)[labels] + 0.01 * torch.randn(40, 3), labels)
    result = few_shot.measure(train, train, knn.classify, classes=CLASSES, labels_per_class=1, draws=2)
    assert {name: result.figures[name] for name in ("knn10", "knn20", "knn100")} == {
        "knn10": 100.0,
        "knn20": 100.0,
        "knn100": 100.0,
    }


def test_more_labels_than_there_are() -> None:
    with pytest.raises(ConfigError, match="labels_per_class is 9 and class 'owl' has 8 labelled .*; use at most 8"):
        few_shot.check_counts(LABELS, CLASSES, 9)
    few_shot.check_counts(LABELS, CLASSES, 8)
