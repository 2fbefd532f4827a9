from __future__ import annotations

from typing import Any

import pytest

from torchmae.report.verdict import (
    collapse_hint,
    data_hint,
    gradient_hint,
    hints,
    loss_hint,
    training_hints,
    update_hint,
)


def train(key: str, values: list[Any]) -> list[dict[str, Any]]:
    return [{"kind": "train", "step": step, key: value} for step, value in enumerate(values, 1)]


def val(key: str, values: list[Any]) -> list[dict[str, Any]]:
    return [{"kind": "val", "step": step, key: value} for step, value in enumerate(values, 1)]


def test_nothing_is_wrong_with_nothing() -> None:
    assert hints([]) == []
    assert hints([{"kind": "val", "step": 1, "loss": None}, {"kind": "train", "step": 1, "grad_norm": None}]) == []


def test_the_last_loss_counts() -> None:
    records = [
        {"kind": "val", "step": step, "loss": loss, "loss_interpolation": 0.6}
        for step, loss in ((1, 0.9), (2, 0.6), (3, 0.5))
    ]
    assert loss_hint(records) == ""
    assert "loss of 0.600 is no better than interpolating from what is visible (0.600)" in loss_hint(records[:2])


@pytest.mark.parametrize(
    ("ranks", "collapsed"), [([30, 60], False), ([60, 16], False), ([60, 14], True), ([2.9], True)]
)
def test_collapse_is_a_fall_or_a_handful_of_directions(ranks: list[float], collapsed: bool) -> None:
    text = collapse_hint(val("effective_rank", ranks))
    assert bool(text) == collapsed
    if collapsed:
        assert f"they use {ranks[-1]:.1f} directions" in text
        assert ("down from 60.0" in text) == (len(ranks) > 1)


def test_the_untrained_network_is_part_of_the_fall() -> None:
    untrained = [{"kind": "baseline", "step": 0, "effective_rank_untrained": 40.0}]
    assert "down from 40.0" in collapse_hint([*untrained, *val("effective_rank", [5.0])])
    assert collapse_hint(untrained) == ""


@pytest.mark.parametrize(("knn", "said"), [(96.0, True), (89.0, True), (99.0, False)])
def test_an_accuracy_of_always_answering_the_commonest_class(knn: float, said: bool) -> None:
    baseline = {"kind": "baseline", "step": 0, "majority": 95.0, "majority_images": 200.0}
    found = hints([baseline, *val("knn", [knn])])
    assert [("95.0%" in hint) for hint in found] == [True] * said


def test_a_gradient_norm_that_leaves_its_range_at_the_end() -> None:
    steady = [1.0, 2.0] * 20
    assert gradient_hint(train("grad_norm", steady)) == ""
    assert gradient_hint(train("grad_norm", [50.0, *steady])) == ""  # the first steps always have it
    assert gradient_hint(train("grad_norm", [*steady, 50.0, 1.0, 1.0])).startswith("The gradient norm rose to 50.000, ")
    assert gradient_hint(train("grad_norm", [1.0, 1.0, 50.0])) == ""  # too few to say what is usual


def test_waiting_for_data_more_than_a_fifth_of_the_time() -> None:
    assert data_hint(train("data_wait", [0.9, 0.2, 0.2])) == ""  # workers start once
    text = data_hint(train("data_wait", [0.9, 0.2, 0.3]))
    assert text.startswith("Training waited for data for 25.0% of the time") and "data.num_workers" in text
    assert data_hint(train("data_wait", [0.9])) == ""


@pytest.mark.parametrize(
    ("update", "advice"), [(1e-5, "try a higher learning rate"), (1e-3, ""), (6e-3, ""), (0.1, "try a lower")]
)
def test_steps_far_from_a_thousandth_of_the_weights(update: float, advice: str) -> None:
    schedule = [0.0, update / 10, *[update] * 10, update / 10, 0.0]
    text = update_hint(train("update_to_weight", schedule))
    assert advice in text and bool(advice) == bool(text)
    if advice:
        assert f"by {update:.1e} of their norm" in text
    assert update_hint(train("update_to_weight", [update] * 3)) == ""  # too few to say what is usual


def test_every_hint_has_its_place() -> None:
    records = [
        *val("effective_rank", [1.0]),
        *[{"kind": "val", "step": 9, "loss": 0.7, "loss_interpolation": 0.6}],
        *train("grad_norm", [1.0] * 20 + [100.0]),
        *train("update_to_weight", [0.5] * 20),
        *train("data_wait", [0.5] * 3),
    ]
    found = hints(records)
    assert [text.split()[1] for text in found] == ["loss", "features", "gradient", "step", "waited"]
    assert training_hints(records) == found[1:]
    assert all("\n" not in text and text.endswith(".") for text in found)
