from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest
from fake_run import train_records, val_records

from torchmae.report.charts import (
    Chart,
    accuracy_chart,
    learning_rate_chart,
    loss_chart,
    rank_chart,
    step_size_chart,
    throughput_chart,
    variance_chart,
)


def all_charts(train: list[dict[str, Any]], val: list[dict[str, Any]]) -> list[Chart]:
    charts = [
        loss_chart(train, val),
        variance_chart(val),
        accuracy_chart(val, "knn", 40.0, 60.0),
        accuracy_chart(val, "linear", 55.0, 65.0),
        learning_rate_chart(train),
        step_size_chart(train),
        throughput_chart(train),
    ]
    return [chart for chart in charts if chart is not None]


def test_a_further_target_has_a_chart_of_its_own() -> None:
    train = [{**record, "loss_hog": 7.0} for record in train_records()]
    chart = loss_chart(train, val_records(), "hog")
    assert chart is not None
    assert [line.label for line in chart.legend] == ["training"]
    assert "7" in chart.alt


def test_every_chart_is_a_labelled_well_formed_drawing() -> None:
    charts = all_charts(train_records(), val_records())
    assert len(charts) == 7
    for chart in charts:
        root = ElementTree.fromstring(chart.svg.replace("<svg ", '<svg xmlns:xlink="x" ', 1))
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"] == chart.alt
        assert root.attrib["viewBox"] == "0 0 360 209"


def test_charts_take_colours_and_font_from_the_page() -> None:
    for chart in all_charts(train_records(), val_records()):
        assert not re.search(r"(?:fill|stroke): #", chart.svg)
        assert "currentColor" in chart.svg and "var(--model)" in chart.svg
        assert "font-family" not in chart.svg
        assert "<style" not in chart.svg


def test_identifiers_are_unique_over_a_page_and_every_reference_has_one() -> None:
    page = "".join(chart.svg for chart in all_charts(train_records(), val_records()))
    identifiers = re.findall(r'id="([^"]*)"', page)
    references = set(re.findall(r"(?:url\(|href=\")#([^)\"]*)", page))
    assert len(identifiers) == len(set(identifiers)) > 0
    assert references <= set(identifiers)


def test_the_same_records_give_the_same_drawing() -> None:
    assert all_charts(train_records(), val_records()) == all_charts(train_records(), val_records())


def test_alt_texts_state_the_numbers() -> None:
    loss, variance, knn, linear, rate, steps, throughput = all_charts(train_records(), val_records())
    assert loss.alt == (
        "Loss over steps: training from 2.400 to 0.600; held-out images from 0.700 to 0.500; "
        "interpolation 0.600; mean patch 1.000."
    )
    assert "this model from 30.0% to 50.0%; interpolation 40.0%" in variance.alt
    assert "this model from 70.0% to 80.0%; raw pixels 60.0%; untrained network 40.0%" in knn.alt
    assert linear.alt == (
        "Linear probe accuracy over steps: this model from 75.0% to 85.0%; raw pixels 65.0%; untrained network 55.0%."
    )
    assert "by 0.1% of their norm (median), at most 0.2%; gradient norm from 1.000 to 1.000" in steps.alt
    assert "highest at step 10 with 0.000909, at the end 9.09e-05" in rate.alt
    assert "median 355 images per second, from 310 to 400" in throughput.alt
    assert "1.0% of the time" in throughput.alt


def test_long_runs_stay_small() -> None:
    noise = np.random.default_rng(0).normal(size=20_000)
    train = [
        {"step": i, "loss": 1 + noise[i], "lr": 1e-3, "images_per_s": 300 + noise[i], "data_wait": 0.1}
        for i in range(20_000)
    ]
    charts = all_charts(train, val_records())
    assert len(charts) == 6
    assert all(len(chart.svg) < 40_000 for chart in charts)


def test_labels_keep_their_digits() -> None:
    val = [{**record, "loss": 0.11, "loss_mean_patch": 0.12, "loss_interpolation": 0.12} for record in val_records()]
    chart = loss_chart([], val)
    assert chart is not None
    labels = re.findall(r">([\d.]+)</text>", chart.svg)
    assert {"0.00", "0.03", "0.06"} <= set(labels)


def test_the_spike_of_the_first_steps_does_not_flatten_the_rest() -> None:
    calm = [{"step": i, "loss": 0.5} for i in range(1, 201)]
    spiked = [{"step": 0, "loss": 1000.0}, *calm]
    assert y_labels(loss_chart(spiked, val_records())) == y_labels(loss_chart(calm, val_records()))


def y_labels(chart: Chart | None) -> list[str]:
    assert chart is not None
    return re.findall(r"text-anchor: end[^>]*>([^<]*)</text>", chart.svg)


def test_negative_explained_variance_is_inside_the_chart() -> None:
    val = [{**record, "explained_variance_interpolation": -0.5} for record in val_records()]
    labels = y_labels(variance_chart(val))
    assert any(label.startswith("-") for label in labels)


@pytest.mark.parametrize("key", ["loss", "images_per_s", "lr"])
def test_values_that_are_no_numbers_are_left_out(key: str) -> None:
    good = train_records()
    bad = [*good, {**good[-1], "step": 110, key: float("nan")}, {**good[-1], "step": 120, key: None}]
    chart_of = {"loss": lambda t: loss_chart(t, []), "images_per_s": throughput_chart, "lr": learning_rate_chart}[key]
    first, second = chart_of(good), chart_of(bad)
    assert first is not None and second is not None
    assert "nan" not in second.svg
    if key != "images_per_s":
        assert second.alt == first.alt


def test_nothing_to_draw_is_no_chart() -> None:
    no_labels = [{key: value for key, value in record.items() if key != "knn"} for record in val_records()]
    assert accuracy_chart(no_labels, "knn", None, None) is None
    assert step_size_chart([{"step": 1, "grad_norm": 1.0}]) is None  # as runs of before have it
    assert all_charts([], []) == []


def test_one_point_is_enough() -> None:
    assert len(all_charts(train_records()[:1], val_records()[:1])) == 7


def test_the_effective_rank_is_drawn_where_it_was_measured() -> None:
    assert rank_chart(val_records(), 34.0) is None
    measured = [{**record, "effective_rank": rank} for record, rank in zip(val_records(), (40.0, 55.0), strict=True)]
    chart = rank_chart(measured, 34.0)
    assert chart is not None
    assert chart.alt.endswith("this model from 40.0 to 55.0; untrained network 34.0.")
    assert [line.label for line in chart.legend] == ["this model", "untrained network"]
    alone = rank_chart(measured, None)
    assert alone is not None and len(alone.legend) == 1
