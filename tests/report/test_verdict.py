from __future__ import annotations

import math

import pytest
from fake_run import summary, val_records

from torchmae.report.metrics import final_figures, finite, number, percent
from torchmae.report.verdict import judge, trend

GOOD = final_figures(summary(), val_records())


def replace(figures: dict[str, float], **changes: float | None) -> dict[str, float]:
    return {name: value for name, value in {**figures, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "level", "answer"),
    [
        ({}, "good", "Yes"),
        ({"knn": None}, "good", "Yes"),
        ({"knn_pixels": None, "knn_untrained": None}, "good", "Yes"),
        ({"knn": 60.5}, "fair", "Yes, but its features are only level with raw pixels"),
        ({"knn": 30.0}, "fair", "Yes, but its features are worse than raw pixels"),
        ({"knn": 30.0, "knn_pixels": None}, "fair", "Yes, but its features are worse than the untrained network"),
        ({"loss": 0.8}, "fair", "Partly, but its features are good"),
        ({"loss": 0.8, "knn": None}, "fair", "Partly"),
        ({"loss": 0.8, "knn": 60.5}, "fair", "Partly"),
        ({"loss": 0.8, "knn": 30.0}, "fair", "Partly, and its features are worse than raw pixels"),
        ({"loss": 1.0, "knn": None}, "poor", "Not yet"),
        ({"loss": 1.1, "knn": 30.0}, "poor", "Not yet"),
        ({"loss": 1.1, "knn": 60.5}, "poor", "Not yet, and its features are only level with raw pixels"),
        ({"loss": 1.1}, "fair", "Not yet, but its features are good"),
        ({"loss": None}, "unknown", "Cannot say"),
        ({"loss_interpolation": None, "knn": None}, "unknown", "Cannot say"),
    ],
)
def test_the_answer_follows_from_the_figures(changes: dict[str, float | None], level: str, answer: str) -> None:
    verdict = judge(replace(GOOD, **changes))
    assert (verdict.level, verdict.answer) == (level, answer)


def test_interpolation_worse_than_the_mean_is_no_bar_that_is_easier() -> None:
    figures = replace(GOOD, loss_interpolation=1.5, knn=None)
    assert judge(replace(figures, loss=1.2)).level == "poor"
    assert judge(replace(figures, loss=0.9)).level == "good"


def test_the_sentences_carry_the_numbers() -> None:
    loss, knn = judge(GOOD).sentences
    assert "0.500 is 50.0% below predicting the mean (1.000)" in loss
    assert "16.7% below interpolation from the visible patches (0.600)" in loss
    assert "50.0% of the variance" in loss
    assert "80.0%" in knn and "60.0% with raw pixels" in knn and "40.0% with the untrained network" in knn
    assert "visible values" in judge(GOOD, "values").sentences[0]


def test_close_calls_depend_on_the_number_of_images() -> None:
    close = replace(GOOD, knn=63.0)
    noise = 2 * math.sqrt(63 * 37 / 1000 + 60 * 40 / 1000)
    assert 3 < noise < 5
    assert judge(close).level == "fair"
    assert f"{noise:.1f} points is too close to call" in judge(close).sentences[1]
    assert judge(replace(close, knn_images=100_000)).level == "good"
    assert judge(replace(close, knn_images=None)).level == "good"
    assert judge(replace(close, knn=60.0, knn_images=None)).sentences[1].endswith("no difference.")


def test_a_model_no_better_than_a_constant_is_not_good() -> None:
    verdict = judge(
        replace(GOOD, loss=1.1, loss_mean_patch=1.3, loss_interpolation=1.2, explained_variance=-0.1, knn=None)
    )
    assert (verdict.level, verdict.answer) == ("poor", "Not yet")
    assert "one constant for everything" in verdict.sentences[0]
    assert "the mean of the visible patches (1.000)" in judge(replace(GOOD, loss=1.1)).sentences[0]


def test_explained_variance_of_the_mean_follows_from_the_losses() -> None:
    variance = 0.8
    losses = {"loss": 0.4, "explained_variance": 1 - 0.4 / variance, "loss_mean_patch": 1.0}
    assert final_figures(losses, [])["explained_variance_mean_patch"] == pytest.approx(1 - 1.0 / variance)
    assert "explained_variance_mean_patch" not in final_figures({**losses, "loss": 0.0}, [])


def test_figures_come_from_the_summary_then_from_the_last_validation_that_has_them() -> None:
    val = [*val_records(), {"step": 110, "loss": 0.45, "knn": None}]
    figures = final_figures({}, val, [{"step": 0, "knn_pixels": 55.0, "effective_rank_untrained": 30.0}])
    expected = {"loss": 0.45, "knn": 80.0, "explained_variance": 0.5, "knn_pixels": 55.0, "step": 110}
    assert figures.items() >= expected.items() and figures["effective_rank_untrained"] == 30.0
    assert "knn_images" not in figures
    assert final_figures(summary(loss=0.3), val)["loss"] == 0.3
    assert final_figures({}, []) == {}


def test_knn_images_are_the_held_out_ones_up_to_the_setting() -> None:
    assert final_figures(summary(), [])["knn_images"] == 1000
    assert final_figures(summary(), [], knn_limit=300)["knn_images"] == 300
    assert "knn_images" not in final_figures(summary(num_val=0), [], knn_limit=300)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "1", True, [1]])
def test_only_finite_numbers_are_figures(value: object) -> None:
    assert finite({"loss": value}, "loss") is None
    assert finite({}, "loss") is None
    assert finite({"loss": 2}, "loss") == 2.0


def curve(*values: float) -> list[dict[str, float]]:
    return [{"step": 10 * (i + 1), "explained_variance": value} for i, value in enumerate(values)]


def test_the_trend_tells_rising_falling_and_level() -> None:
    assert "rose by 5.0 points" in trend(curve(0.1, 0.2, 0.3, 0.35, 0.40))
    assert "highest at step 30 (50.0%) and fell to 40.0%" in trend(curve(0.1, 0.3, 0.5, 0.45, 0.4))
    assert trend(curve(0.1, 0.3, 0.5, 0.5, 0.505)) == ""
    assert trend(curve(0.1, 0.9)) == ""
    assert trend([]) == ""


@pytest.mark.parametrize(
    ("value", "text"), [(0.4123, "0.412"), (1.0, "1.000"), (0.01234, "0.0123"), (12345.0, "1.23e+04"), (0.0, "0")]
)
def test_losses_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_percent() -> None:
    assert percent(0.6184) == "61.8%"


def test_data_that_pixels_alone_can_tell_apart_is_said_to_be_so() -> None:
    figures = final_figures({"knn": 92.5, "knn_pixels": 98.3, "knn_untrained": 46.4, "num_val": 360}, (), ())
    verdict = judge(figures)
    assert any("Pixels alone tell these classes apart" in text for text in verdict.sentences)
    harder = judge(final_figures({"knn": 32.5, "knn_pixels": 38.3, "num_val": 5000}, (), ()))
    assert any("not worth having yet" in text for text in harder.sentences)
