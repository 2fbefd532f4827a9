from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from torchmae.evaluation.scores import (
    MAX_CONFUSION_CLASSES,
    Labelled,
    bootstrap_interval,
    chance_note,
    majority,
    num_classes_of,
    rank,
    score,
)


def test_scores_by_hand() -> None:
    ranking = torch.tensor([[0, 1, 2], [1, 0, 2], [1, 2, 0], [2, 1, 0]])
    scores = score(ranking, torch.tensor([0, 0, 1, 0]), num_classes=4)
    assert scores.top1 == 50.0
    assert scores.top5 is None  # of four classes it would say nothing
    assert scores.counts.tolist() == [3, 1, 0, 0]
    assert scores.per_class[:2].tolist() == pytest.approx([100 / 3, 100.0])
    assert scores.per_class[2:].isnan().all()
    assert scores.confusion.tolist() == [[1, 1, 1, 0], [0, 1, 0, 0], [0] * 4, [0] * 4]


def test_top5_counts_a_class_among_the_first_five() -> None:
    votes = torch.arange(8.0).flip(0).expand(3, 8)  # the order 0, 1, 2, ...
    scores = score(rank(votes), torch.tensor([0, 4, 5]), num_classes=8)
    assert scores.top1 == pytest.approx(100 / 3)
    assert scores.top5 == pytest.approx(200 / 3)


def test_rank_gives_all_classes_when_there_are_fewer_than_five() -> None:
    assert rank(torch.tensor([[0.1, 0.7, 0.2]])).tolist() == [[1, 2, 0]]


@pytest.mark.parametrize(("correct", "count"), [(40, 100), (3, 20), (499, 500)])
def test_the_interval_is_that_of_resampling(correct: int, count: int) -> None:
    answers = np.arange(count) < correct
    resamples = np.random.default_rng(0).choice(answers, size=(20_000, count)).mean(1)
    low, high = bootstrap_interval(correct, count)
    assert [low, high] == pytest.approx(np.percentile(resamples, [2.5, 97.5]).tolist(), abs=1.01 / count)


def test_the_interval_of_many_answers_is_the_normal_one() -> None:
    low, high = bootstrap_interval(600_000, 1_000_000)
    half = 1.959964 * math.sqrt(0.6 * 0.4 / 1_000_000)
    assert [low, high] == pytest.approx([0.6 - half, 0.6 + half], abs=2e-6)


@pytest.mark.parametrize("correct", [0, 7])
def test_the_interval_where_all_answers_agree(correct: int) -> None:
    assert bootstrap_interval(correct, 7) == (correct / 7, correct / 7)


def test_figures_and_details_are_plain_json() -> None:
    scores = score(torch.tensor([[0], [1]]), torch.tensor([0, 0]), num_classes=2)
    assert scores.figures("knn20") == {"knn20": 50.0, "knn20_low": 0.0, "knn20_high": 100.0}
    details = json.loads(json.dumps(scores.details(["cat", "dog"]), allow_nan=False))
    assert details["per_class"] == [
        {"class": "cat", "images": 2, "top1": 50.0},
        {"class": "dog", "images": 0, "top1": None},
    ]
    assert details["confusion"] == [[1, 1], [0, 0]]


def test_a_very_large_confusion_matrix_is_left_out() -> None:
    many = MAX_CONFUSION_CLASSES + 1
    scores = score(torch.tensor([[0]]), torch.tensor([0]), num_classes=many)
    assert scores.details([str(i) for i in range(many)])["confusion"] is None


def test_num_classes_covers_all_sets() -> None:
    sets = [Labelled(torch.zeros(2, 1), torch.tensor(labels)) for labels in ([0, 1], [4, 2])]
    assert num_classes_of(*sets) == 5


def test_accuracies_at_chance_are_said_to_be_so() -> None:
    train, test = np.array([0, 0, 0, 1, 2]), np.array([0] * 4 + [1] * 4 + [2] * 2)
    assert majority(train, test) == (0, 40.0)
    poor = {"knn20": 50.0, "knn20_low": 30.0, "knn20_high": 70.0, "loss": 99.0}
    (note,) = chance_note(poor, train, test, ("cat", "dog", "eel"))
    assert "'cat' (40.0%)" in note and "shards" not in note
    (note,) = chance_note(poor, train, test, ("000", "001", "shard-2"))
    assert "shards" in note
    assert not chance_note({**poor, "linear": 60.0, "linear_low": 41.0}, train, test, ("0", "1", "2"))
    assert not chance_note({"loss": 1.0}, train, test, ("0", "1", "2"))
