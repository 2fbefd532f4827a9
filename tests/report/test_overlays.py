from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import numpy as np
import pytest

from torchmae.report.overlays import Curve, overlay, spread_letters


def curve(letter: str, order: int, values: list[float]) -> Curve:
    return Curve(letter, order, (np.arange(1.0, len(values) + 1), np.array(values)))


def show(value: float) -> str:
    return f"{value:.2f}"


def test_every_run_has_its_colour_and_its_letter() -> None:
    chart = overlay("Loss", "loss", [curve("A", 0, [3, 2]), curve("C", 2, [2, 1])], show=show, along="images seen")
    assert chart is not None
    assert chart.alt == "Loss over images seen: A from 3.00 to 2.00; C from 2.00 to 1.00."
    assert "var(--run-0)" in chart.svg and "var(--run-2)" in chart.svg and "var(--run-1)" not in chart.svg
    root = ElementTree.fromstring(chart.svg.replace("<svg ", '<svg xmlns:xlink="x" ', 1))
    texts = [text.text for text in root.iter("text")]
    assert texts.count("A") == texts.count("C") == 1 and "images seen" in texts
    assert root.attrib["aria-label"] == chart.alt
    assert not re.search(r"(?:fill|stroke): #", chart.svg)


def test_the_ninth_run_is_dashed() -> None:
    drawn = [overlay("Loss", "loss", [curve("A", order, [3, 2])], show=show, along="step") for order in (7, 8)]
    dashes = [chart.svg.count("stroke-dasharray") for chart in drawn if chart is not None]
    assert dashes[1] == dashes[0] + 1
    assert drawn[1] is not None and "var(--run-0)" in drawn[1].svg


def test_a_level_is_in_the_legend_and_the_words() -> None:
    curves = [curve("A", 0, [3, 2])]
    chart = overlay("Loss", "loss", curves, show=show, along="step", level=("raw pixels", 1.5))
    assert chart is not None
    assert [(line.label, line.dashed) for line in chart.legend] == [("raw pixels", True)]
    assert chart.alt.endswith("raw pixels 1.50.")


def test_runs_without_the_figure_are_left_out() -> None:
    empty = Curve("A", 0, (np.empty(0), np.empty(0)))
    assert overlay("Loss", "loss", [empty], show=show, along="step") is None
    chart = overlay("Loss", "loss", [empty, curve("B", 1, [1])], show=show, along="step")
    assert chart is not None and chart.alt == "Loss over step: B from 1.00 to 1.00."


@pytest.mark.parametrize("heights", [[0.5], [0.1, 0.9], [0.5, 0.5, 0.51], [1.0, 0.99, 0.98], [0.0, 0.0], [0.2] * 16])
def test_letters_keep_their_order_and_do_not_overlap(heights: list[float]) -> None:
    placed = spread_letters(heights)
    order = np.argsort(heights, kind="stable")
    assert all(high - low >= 0.0749 for low, high in pairwise(np.array(placed)[order]))
    assert min(placed) >= -1e-9 and max(placed) <= max(1, 0.075 * (len(heights) - 1)) + 1e-9


def test_letters_with_room_stay_where_they_are() -> None:
    assert spread_letters([0.9, 0.1, 0.5]) == pytest.approx([0.9, 0.1, 0.5])
