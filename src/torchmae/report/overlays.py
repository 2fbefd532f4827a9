"""Curves of several runs in one drawing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from torchmae.report.charts import LEVEL_COLOUR, RUN_COLOURS, Chart, Line, Points, step_axes, thin, to_svg

# Room between two letters at the right edge, as a share of the height.
_LETTER_HEIGHT = 0.075


@dataclass(frozen=True)
class Curve:
    """A run's line in a chart.

    Attributes:
        letter: what the run is called at the line's end.
        order: of the run; fixes the colour, and from the ninth on dashes.
        points: where along the horizontal axis, and how high.
    """

    letter: str
    order: int
    points: tuple[Points, Points]


def overlay(
    title: str,
    name: str,
    curves: Sequence[Curve],
    *,
    show: Callable[[float], str],
    along: str,
    level: tuple[str, float] | None = None,
    from_zero: bool = False,
) -> Chart | None:
    """One chart of several runs; each line ends in its run's letter.

    Args:
        title: what it shows.
        name: a prefix that keeps the identifiers of several charts on one page apart.
        curves: of the runs that have it.
        show: a value as text, on the axis and in the description.
        along: what the horizontal axis counts.
        level: name and height of a line to compare with.
        from_zero: whether the vertical axis begins at zero.

    Returns:
        None without data.
    """
    drawn = [curve for curve in curves if len(curve.points[0])]
    if not drawn:
        return None
    parts = [f"{curve.letter} from {show(curve.points[1][0])} to {show(curve.points[1][-1])}" for curve in drawn]
    if level:
        parts.append(f"{level[0]} {show(level[1])}")
    alt = f"{title} over {along}: {'; '.join(parts)}."

    def draw(figure: Figure) -> None:
        axes = step_axes(figure.add_subplot(), along)
        for curve in drawn:
            x, y = thin(curve.points)
            style = "-" if curve.order < len(RUN_COLOURS) else "--"
            marker = "o" if len(x) <= 30 else ""
            axes.plot(x, y, color=_colour(curve), linewidth=1.6, linestyle=style, marker=marker, markersize=3)
        if level:
            axes.axhline(level[1], color=LEVEL_COLOUR, linewidth=1.5, linestyle="--")
        low, high = _limits(drawn, level, from_zero)
        axes.set_ylim(low, high)
        axes.margins(x=0.015)
        axes.set_xlim(left=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
        ends = [(float(curve.points[1][-1]) - low) / (high - low) for curve in drawn]
        for curve, height in zip(drawn, spread_letters(ends), strict=True):
            axes.text(1.015, height, curve.letter, color=_colour(curve), transform=axes.transAxes, va="center")

    legend = (Line(level[0], "mean", dashed=True),) if level else ()
    return Chart(title, alt, to_svg(draw, name, alt), legend)


def spread_letters(heights: Sequence[float]) -> list[float]:
    """Heights as near as can be to those given, in their order, but so far apart that letters do not overlap.

    Args:
        heights: shares of the drawing's height, in any order.
    """
    order = np.argsort(heights, kind="stable")
    placed = np.array(heights, dtype=np.float64)[order].clip(0, 1)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + _LETTER_HEIGHT)
    # What was pushed out at the top comes back down, and pushes those below it.
    limit = max(1.0, _LETTER_HEIGHT * (len(placed) - 1))
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit - _LETTER_HEIGHT * (len(placed) - 1 - i))
    spread = np.empty(len(placed))
    spread[order] = placed
    return [float(height) for height in spread]


def _colour(curve: Curve) -> str:
    return RUN_COLOURS[curve.order % len(RUN_COLOURS)]


def _limits(curves: Sequence[Curve], level: tuple[str, float] | None, from_zero: bool) -> tuple[float, float]:
    """The range that shows every end, but not the spike that many losses begin with."""
    tops = [max(float(np.percentile(y, 95)), float(y[-1])) for _, y in (curve.points for curve in curves)]
    bottoms = [float(y.min()) for _, y in (curve.points for curve in curves)]
    high = max([*tops, *([level[1]] if level else [])])
    low = 0.0 if from_zero else min([*bottoms, *([level[1]] if level else [])])
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if from_zero else low - margin), high + margin
