from __future__ import annotations

import numpy as np
import pytest
import torch

from torchmae.errors import ConfigError
from torchmae.evaluation import bench, knn
from torchmae.evaluation.scores import Labelled
from torchmae.evaluation.sharing import Parts

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
    draws = [few for few, _ in bench.draws_of(train, 4, draws=3, seed=0)]
    assert [np.bincount(draw.labels).tolist() for draw in draws] == [[4, 4, 4]] * 3
    for draw in draws:
        assert torch.equal(train.labels[draw.features[:, 0].long()], draw.labels)


def test_a_draw_is_of_as_many_groups_as_there_are() -> None:
    labels = np.repeat([0, 1], 30)
    groups = np.array([f"{i // 10}" for i in range(30)] + [f"{i // 3}" for i in range(30)])  # 3 and 10 groups
    for draw in range(20):
        chosen = bench.draw_images(labels, 6, 0, draw, groups)
        assert np.bincount(labels[chosen]).tolist() == [6, 6]
        counts = [np.unique(groups[chosen[labels[chosen] == label]], return_counts=True)[1] for label in (0, 1)]
        assert [sorted(item) for item in counts] == [[2, 2, 2], [1] * 6]
    train = Labelled(torch.arange(60.0)[:, None], torch.from_numpy(labels))
    numbers = torch.from_numpy(np.unique(groups, return_inverse=True)[1])
    ((few, parts),) = bench.draws_of(train, 6, 1, 0, Parts(numbers))
    assert parts.groups is not None
    assert torch.equal(parts.groups, numbers[few.features[:, 0].long()])


def test_knn_with_fewer_images_than_neighbours() -> None:
    labels = torch.from_numpy(LABELS)
    train = Labelled(torch.eye(3)[labels] + 0.01 * torch.randn(40, 3), labels)
    for few, _ in bench.draws_of(train, 1, draws=2, seed=0):
        rankings = knn.classify(few, train, 3)
        assert [*rankings] == ["knn10", "knn20", "knn100"]
        assert all(torch.equal(ranking[:, 0], labels) for ranking in rankings.values())


def test_more_labels_than_there_are() -> None:
    with pytest.raises(ConfigError, match="labels_per_class is 9 and class 'owl' has 8 labelled .*; use at most 8"):
        bench.check_counts(LABELS, CLASSES, 9)
    bench.check_counts(LABELS, CLASSES, 8)
