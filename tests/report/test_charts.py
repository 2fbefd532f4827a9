from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from fake_run import train_records, val_records

from torchmae.report.charts import HEIGHT, WIDTH, Chart, Line, Panel, Stroke, chart, level, series_of
from torchmae.report.metrics import ACCURACY, COUNT, LOSS, SHARE, Unit


def line(records: list[dict[str, Any]], key: str, label: str = "this model", colour: str = "model") -> Line:
    return Line(label, colour, *series_of(records, key))


def run(letter: str, values: list[float], **others: Any) -> Line:
    return Line("runs/a", "run-0", np.arange(1.0, len(values) + 1), np.array(values), letter=letter, **others)


def drawn(*panels: Panel) -> Chart:
    made = chart("Loss", *panels)
    assert made is not None
    return made


def points(stroke: Stroke) -> np.ndarray[Any, Any]:
    return np.array([list(map(float, pair.split(","))) for pair in stroke.path[1:].split(" ")])


def test_points_stand_where_the_axes_say() -> None:
    made = drawn(Panel([run("", [0.0, 50.0, 100.0])], ACCURACY))
    ((area,), ticks) = made.areas, {text: x for x, text in made.ticks}
    heights = {text: y for y, text in area.ticks}
    placed = points(area.strokes[0])
    assert placed[0] == pytest.approx([ticks["1"], heights["0%"]], abs=0.1)
    assert placed[2] == pytest.approx([ticks["3"], heights["100%"]], abs=0.1)
    assert placed[1, 1] == pytest.approx(placed[[0, 2], 1].mean(), abs=0.1)
    assert (placed >= 0).all() and (placed <= [WIDTH, HEIGHT]).all()


def test_panels_do_not_overlap_and_share_their_horizontal_axis() -> None:
    train = train_records()
    made = drawn(Panel([line(train, "images_per_s")], COUNT), Panel([line(train, "data_wait")], SHARE))
    upper, lower = (points(area.strokes[0]) for area in made.areas)
    assert upper[:, 1].max() < lower[:, 1].min()
    assert np.array_equal(upper[:, 0], lower[:, 0])
    assert made.alt == "Loss over steps: this model from 310 to 400; this model from 1.0% to 1.0%."


def test_alt_texts_state_the_numbers() -> None:
    val = val_records()
    levels = [level("interpolation", 0.6, "interpolation"), level("mean patch", None, "mean")]
    made = drawn(Panel([line(train_records(), "loss", "training"), line(val, "loss"), *levels], LOSS))
    assert made.alt == (
        "Loss over steps: training from 2.400 to 0.600; this model from 0.700 to 0.500; interpolation 0.600."
    )
    assert [item.label for item in made.legend] == ["training", "this model", "interpolation"]
    assert drawn(Panel([run("", [0.0, 3.0, -1.0, 1.0])], LOSS)).alt.endswith(
        "runs/a from 0 to 1.000, at least -1.000, at most 3.000."
    )


def test_long_runs_stay_small_and_the_mean_of_their_neighbours() -> None:
    noise = np.random.default_rng(0).normal(size=20_000)
    stroke = drawn(Panel([Line("a", "train", np.arange(20_000.0), 1 + noise)], LOSS)).areas[0].strokes[0]
    assert len(points(stroke)) == 400 and len(stroke.path) < 6000 and not stroke.dots
    assert np.diff(points(stroke)[:, 1]).std() < 10


def test_the_spike_of_the_first_steps_does_not_flatten_the_rest() -> None:
    calm = [0.5] * 200
    spiked, flat = (drawn(Panel([run("", values)], LOSS)).areas[0].ticks for values in ([1000.0, *calm], calm))
    assert spiked == flat


def test_negative_values_are_inside_the_chart() -> None:
    made = drawn(Panel([run("", [0.1, 0.5]), level("interpolation", -0.5, "interpolation")], SHARE))
    labels = [text for _, text in made.areas[0].ticks]
    assert labels[0].startswith("-") and labels == sorted(labels, key=lambda text: float(text[:-1]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "1", True])
def test_values_that_are_no_numbers_are_left_out(bad: Any) -> None:
    good = train_records()
    for one, other in zip(series_of(good, "lr"), series_of([*good, {"step": 110, "lr": bad}], "lr"), strict=True):
        assert np.array_equal(one, other)


def test_nothing_to_draw_is_no_chart() -> None:
    assert chart("Loss", Panel([level("raw pixels", 1.0, "mean")], LOSS)) is None
    assert chart("Loss", Panel([run("A", [1.0])], LOSS), Panel([run("A", [])], LOSS)) is None
    assert len(drawn(Panel([run("A", []), run("B", [1.0])], LOSS)).areas[0].strokes) == 1


def test_ticks_have_the_signs_of_their_unit() -> None:
    def texts(unit: Unit, *values: float) -> set[str]:
        return {text for _, text in drawn(Panel([run("", list(values))], unit)).areas[0].ticks}

    assert {"0%", "60%"} <= texts(SHARE, 0.0, 0.6)
    assert {"0", "0.03"} <= texts(LOSS, 0.11, 0.12)
    assert "6,000" in texts(COUNT, 0, 9000)


@pytest.mark.parametrize("ends", [[0.5], [0.1, 0.9], [0.5, 0.5, 0.51], [1.0, 0.99, 0.98], [0.0, 0.0], [0.2] * 9])
def test_letters_keep_their_order_and_do_not_overlap(ends: list[float]) -> None:
    made = drawn(Panel([run("A", [0.0, 1.0]), *(run("B", [0.5, end]) for end in ends)], LOSS))
    letters = [stroke.end[1] for stroke in made.areas[0].strokes]
    order = np.argsort([1.0, *ends], kind="stable")
    room = 0.075 * (HEIGHT - 44)
    heights = sorted(letters)
    assert all(low - high >= room - 0.2 for high, low in pairwise(heights))
    assert all(letters[a] >= letters[b] for a, b in pairwise(order) if [1.0, *ends][a] < [1.0, *ends][b])
    assert heights[0] >= 0 and heights[-1] <= HEIGHT
    assert not made.legend
