from __future__ import annotations

import numpy as np
import pytest
import torch

from torchmae.errors import ConfigError
from torchmae.evaluation import bench, knn
from torchmae.evaluation.scores import Labelled

CLASSES = ("cat", "dog", "owl")
LABELS = np.repeat([0, 1, 2], [20, 12, 8])


def test_a_draw_has_the_same_number_of_each_class_and_is_a_function_of_seed_and_number() -> None:
    first = bench.draw_images(LABELS, 5, seed=0, draw=0)
    assert np.bincount(LABELS[first]).tolist() == [5, 5, 5]
    assert len(set(first.tolist())) == 15
    np.testing.assert_array_equal(first, bench.draw_images(LABELS, 5, seed=0, draw=0))
    assert first.tolist() != bench.draw_images(LABELS, 5, seed=0, draw=1).tolist()
    assert first.tolist() != bench.draw_images(LABELS, 5, seed=1, draw=0).tolist()


def test_every_image_is_drawn_about_equally_often() -> None:
    counts = np.zeros(len(LABELS))
    for draw in range(400):
        counts[bench.draw_images(LABELS, 4, seed=0, draw=draw)] += 1
    expected = 400 * 4 / np.array([20, 12, 8])[LABELS]
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_each_draw_is_of_features_and_their_labels() -> None:
    train = Labelled(torch.arange(40.0)[:, None], torch.from_numpy(LABELS))
    draws = list(bench.draws_of(train, 4, draws=3, seed=0))
    assert [np.bincount(draw.labels).tolist() for draw in draws] == [[4, 4, 4]] * 3
    for draw in draws:
        assert torch.equal(train.labels[draw.features[:, 0].long()], draw.labels)


def test_knn_with_fewer_images_than_neighbours() -> None:
    labels = torch.from_numpy(LABELS)
    train = Labelled(torch.eye(3)[labels] + 0.01 * torch.randn(40, 3), labels)
    for few in bench.draws_of(train, 1, draws=2, seed=0):
        rankings = knn.classify(few, train, 3)
        assert [*rankings] == ["knn10", "knn20", "knn100"]
        assert all(torch.equal(ranking[:, 0], labels) for ranking in rankings.values())


def test_more_labels_than_there_are() -> None:
    with pytest.raises(ConfigError, match="labels_per_class is 9 and class 'owl' has 8 labelled .*; use at most 8"):
        bench.check_counts(LABELS, CLASSES, 9)
    bench.check_counts(LABELS, CLASSES, 8)
