from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from torchmae.evaluation.scores import (
    MAX_CONFUSION_CLASSES,
    chance_note,
    majority,
    over_draws,
    rank,
    score,
    wilson_interval,
)


def test_scores_by_hand() -> None:
    ranking = torch.tensor([[0, 1, 2], [1, 0, 2], [1, 2, 0], [2, 1, 0]])
    result = score("knn20", ranking, torch.tensor([0, 0, 1, 0]), ["cat", "dog", "eel", "owl"])
    low, high = (100 * end for end in wilson_interval(2, 4))
    macro = 100 * (1 / 3 + 1) / 2
    wanted = {"knn20": 50.0, "knn20_low": low, "knn20_high": high, "knn20_macro": macro}
    assert result.figures == pytest.approx(wanted)  # top-5 of four would say nothing
    even = score("knn20", ranking, torch.tensor([0, 1, 1, 0]), ["cat", "dog", "eel", "owl"]).figures
    assert "knn20_macro" not in even  # it would be the accuracy
    details = json.loads(json.dumps(result.details["knn20"], allow_nan=False))
    assert details["per_class"] == [
        {"class": "cat", "images": 3, "top1": pytest.approx(100 / 3)},
        {"class": "dog", "images": 1, "top1": 100.0},
        {"class": "eel", "images": 0, "top1": None},
        {"class": "owl", "images": 0, "top1": None},
    ]
    assert details["confusion"] == [[1, 1, 1, 0], [0, 1, 0, 0], [0] * 4, [0] * 4]


def test_top5_counts_a_class_among_the_first_five() -> None:
    votes = torch.arange(8.0).flip(0).expand(3, 8)  # the order 0, 1, 2, ...
    figures = score("x", rank(votes), torch.tensor([0, 4, 5]), list("abcdefgh")).figures
    assert figures["x"] == pytest.approx(100 / 3)
    assert figures["x_top5"] == pytest.approx(200 / 3)


def test_rank_gives_all_classes_when_there_are_fewer_than_five() -> None:
    assert rank(torch.tensor([[0.1, 0.7, 0.2]])).tolist() == [[1, 2, 0]]


@pytest.mark.parametrize(
    ("correct", "count", "ends"),
    [(20, 20, (0.8389, 1.0)), (0, 1, (0.0, 0.7935)), (1, 1, (0.2065, 1.0)), (40, 100, (0.3094, 0.4980))],
)
def test_the_interval_is_wilsons_and_never_a_point(correct: int, count: int, ends: tuple[float, float]) -> None:
    found = wilson_interval(correct, count)
    assert found == pytest.approx(ends, abs=1e-4)
    assert found[0] <= correct / count <= found[1]


def test_the_interval_of_many_answers_is_the_normal_one() -> None:
    low, high = wilson_interval(600_000, 1_000_000)
    half = 1.959964 * math.sqrt(0.6 * 0.4 / 1_000_000)
    assert [low, high] == pytest.approx([0.6 - half, 0.6 + half], abs=2e-6)


def test_a_very_large_confusion_matrix_is_never_made() -> None:
    many = [""] * 10**6  # whose square would be 8 TB
    result = score("x", torch.tensor([[0], [5]]), torch.tensor([0, 4]), many)
    assert (result.figures["x"], result.details["x"]["confusion"]) == (50.0, None)
    few = score("x", torch.tensor([[0]]), torch.tensor([0]), [""] * MAX_CONFUSION_CLASSES)
    assert few.details["x"]["confusion"] is not None


def test_draws_are_a_mean_and_a_deviation() -> None:
    draws = [{"probe": value, "seconds": 2.0} for value in (90.0, 80.0, 70.0)]
    result = over_draws(draws, ["probe"])
    assert result.figures == pytest.approx({"probe": 80.0, "seconds": 2.0, "probe_std": 10.0})
    assert result.details == {"probe": {"draws": [90.0, 80.0, 70.0]}}
    assert over_draws(draws[:1], ["probe"]).figures["probe_std"] == 0


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
    assert chance_note({"knn20": 45.0, "knn20_std": 6.0}, train, test, ("cat", "dog", "eel"))
    assert not chance_note({"knn20": 75.0, "knn20_std": 6.0}, train, test, ("cat", "dog", "eel"))
