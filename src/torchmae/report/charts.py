"""Layout of line charts; macros.html draws them as SVG in the page's colours and font."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from torchmae.report.metrics import Unit, finite
from torchmae.report.run import short_count

Points: TypeAlias = npt.NDArray[np.float64]
# The ends of a range of values, and their coordinates in the drawing.
Scale: TypeAlias = tuple[tuple[float, float], tuple[float, float]]

RUN_COLOURS = tuple(f"run-{i}" for i in range(8))
# Of the drawing, in the units of its text: small, so that the text is legible on a phone.
WIDTH, HEIGHT = 360, 209
_BELOW, _ABOVE, _BETWEEN, _RIGHT = 36, 8, 16, 22
_LETTER_WIDTH = 6.2
_MAX_POINTS = 400
# Room between two letters at the right edge, as a share of the height.
_LETTER_HEIGHT = 0.075


@dataclass(frozen=True)
class Line:
    """A line of a chart; `colour` is one of the style sheet: model, train, mean, interpolation, run-0 to run-7.

    A `level` is one value, drawn dashed over the whole width. A `letter` stands at the line's end, in place of an entry
    of the legend.
    """

    label: str
    colour: str
    x: Points
    y: Points
    level: bool = False
    dashed: bool = False
    letter: str = ""


class Panel(NamedTuple):
    """Lines of one unit over one horizontal axis; lines without points are not drawn."""

    lines: Sequence[Line]
    unit: Unit
    from_zero: bool = True


class Stroke(NamedTuple):
    """A line in the drawing: its SVG path, (x, y) of the dots at its points, (x, y) of its letter."""

    line: Line
    path: str
    dots: Sequence[tuple[float, float]]
    end: tuple[float, float]


class Area(NamedTuple):
    """A panel in the drawing: (y, text) of the ticks of its vertical axis, and its lines."""

    ticks: Sequence[tuple[float, str]]
    strokes: Sequence[Stroke]


class Chart(NamedTuple):
    """A chart as a drawing of `WIDTH` times `HEIGHT`; `alt` states its numbers for a screen reader.

    The horizontal axis is labelled `along` and begins at `left`; `ticks` are (x, text). A single line has no legend.
    """

    title: str
    alt: str
    along: str
    left: float
    ticks: Sequence[tuple[float, str]]
    areas: Sequence[Area]
    legend: Sequence[Line]


def chart(title: str, *panels: Panel, along: str = "steps") -> Chart | None:
    """Lays out panels below each other over a common axis labelled `along`; the first of two panels is higher.

    None if a panel has no lines but levels.
    """
    panels = tuple(panel._replace(lines=[line for line in panel.lines if len(line.x)]) for panel in panels)
    if not all(any(not line.level for line in panel.lines) for panel in panels):
        return None
    lines = [line for panel in panels for line in panel.lines]
    far = max(float(line.x[-1]) for line in lines if not line.level) * 1.015 or 1.0
    shares = (0.6, 0.4) if len(panels) == 2 else (1 / len(panels),) * len(panels)
    scales = [_limits(panel) for panel in panels]
    labels = [
        _labels(panel.unit, *scale, 5 if len(panels) == 1 else 3) for panel, scale in zip(panels, scales, strict=True)
    ]
    left = 10 + _LETTER_WIDTH * max(len(text) for ticks in labels for _, text in ticks)
    across: Scale = ((0.0, far), (left, WIDTH - _RIGHT))
    areas, top = [], float(_ABOVE)
    for panel, scale, ticks, share in zip(panels, scales, labels, shares, strict=True):
        height = share * (HEIGHT - _ABOVE - _BELOW - _BETWEEN * (len(panels) - 1))
        down: Scale = (scale, (top + height, top))
        strokes = [_stroke(line, across, down) for line in panel.lines]
        ends = _spread_letters([(stroke.end[1] - top) / height for stroke in strokes])
        placed = [
            s._replace(end=(s.end[0], round(top + height * end, 1))) for s, end in zip(strokes, ends, strict=True)
        ]
        areas.append(Area([(_place(value, down), text) for value, text in ticks], placed))
        top += height + _BETWEEN
    steps = _ticks(0, far, 6, integer=True)
    legend = [line for line in lines if not line.letter]
    return Chart(
        title,
        f"{title} over {along}: {'; '.join(_sentence(line, panel.unit) for panel in panels for line in panel.lines)}.",
        along,
        round(left, 1),
        [(_place(tick, across), short_count(tick)) for tick in steps],
        areas,
        legend if len(lines) > 1 else [],
    )


def series_of(records: Sequence[Mapping[str, Any]], key: str) -> tuple[Points, Points]:
    """(steps, values) of the records with a finite value under `key`."""
    pairs = [(float(record["step"]), value) for record in records if (value := finite(record, key)) is not None]
    points = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def level(label: str, value: float | None, colour: str) -> Line:
    """A horizontal line at a value; None: no line."""
    values = np.array([] if value is None else [value])
    return Line(label, colour, values, values, level=True)


def _sentence(line: Line, unit: Unit) -> str:
    """First and last value of a line, and its extremes if they lie beyond."""
    if line.level:
        return f"{line.label} {unit.text(line.y[-1])}"
    first, last, low, high = (unit.text(float(value)) for value in (line.y[0], line.y[-1], line.y.min(), line.y.max()))
    beyond = [f"at least {low}"] * (low not in (first, last)) + [f"at most {high}"] * (high not in (first, last))
    return ", ".join([f"{line.letter or line.label} from {first} to {last}", *beyond])


def _limits(panel: Panel) -> tuple[float, float]:
    """The range of the vertical axis, without the spike at the start of many losses."""
    highest = max(max(float(np.percentile(line.y, 98)), float(line.y[-1])) for line in panel.lines)
    lowest = min(float(line.y.min()) for line in panel.lines)
    lowest = min(lowest, 0.0) if panel.from_zero else lowest
    margin = 0.08 * (highest - lowest) or 0.05 * abs(highest) or 1.0
    return (lowest if lowest == 0 else lowest - margin), highest + margin


def _labels(unit: Unit, low: float, high: float, count: int) -> list[tuple[float, str]]:
    """The ticks between two values, with their texts."""
    return [(tick, f"{round(tick * unit.scale, 9):,.6g}{unit.sign}") for tick in _ticks(low, high, count)]


def _ticks(low: float, high: float, count: int, *, integer: bool = False) -> list[float]:
    """Round numbers between two values, about `count`."""
    from matplotlib.ticker import MaxNLocator

    return [float(tick) for tick in MaxNLocator(count, integer=integer).tick_values(low, high) if low <= tick <= high]


def _place(value: float, scale: Scale) -> float:
    """The coordinate of a value, clipped to the scale."""
    return round(float(np.interp(value, *scale)), 1)


def _stroke(line: Line, across: Scale, down: Scale) -> Stroke:
    parts = min(len(line.x), _MAX_POINTS)  # each point is a mean of neighbours, which smooths a noisy loss
    x, y = ([part.mean() for part in np.array_split(values, parts)] for values in (line.x, line.y))
    if line.level:
        x, y = list(across[0]), [y[-1]] * 2
    placed = [(_place(one, across), _place(other, down)) for one, other in zip(x, y, strict=True)]
    path = "M" + " ".join(f"{one:g},{other:g}" for one, other in placed)
    has_dots = not line.level and line.colour != "train" and len(placed) <= 30
    return Stroke(line, path, placed if has_dots else [], (across[1][1] + 4, placed[-1][1]))


def _spread_letters(heights: Sequence[float]) -> list[float]:
    """The given shares of the height, moved as little as possible so that letters in this order do not overlap."""
    order = np.argsort(heights, kind="stable")
    room = _LETTER_HEIGHT * np.arange(len(heights))
    lowest = np.maximum.accumulate(np.array(heights, dtype=np.float64)[order].clip(0, 1) - room) + room
    spread = np.empty(len(heights))
    spread[order] = np.minimum(lowest, max(1.0, room[-1]) - room[::-1])
    return [float(height) for height in spread]
