"""Curves of a run as inline SVG, small and deterministic, that follow the page's colours and font."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from torchmae.report.verdict import finite, number, percent

Records: TypeAlias = Sequence[Mapping[str, Any]]
Points: TypeAlias = npt.NDArray[np.float64]

# Drawn in these colours by matplotlib, then replaced by what the page's style sheet defines. No colour of its own
# survives, so the same SVG serves light and dark pages.
_TEXT, _GRID = "#010101", "#020202"
_SERIES = {"model": "#030303", "train": "#040404", "mean": "#050505", "interpolation": "#060606"}
LEVEL_COLOUR = _SERIES["mean"]
RUN_COLOURS = tuple(f"#0a0b{i:02x}" for i in range(8))
_CSS = {
    _TEXT: "currentColor",
    _GRID: "var(--grid)",
    **{colour: f"var(--{name})" for name, colour in _SERIES.items()},
    **{colour: f"var(--run-{i})" for i, colour in enumerate(RUN_COLOURS)},
}

ACCURACIES = {"knn": "kNN accuracy", "linear": "Linear probe accuracy"}
"""The classifiers that are run on the way, by their keys in metrics.jsonl."""

_MAX_POINTS = 400
# Inches at 72 to the inch: a narrow drawing, so that its text is still legible on a phone.
_SIZE = (5.0, 2.9)
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "torchmae",
    "font.size": 10,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _TEXT,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": _GRID,
    "text.color": _TEXT,
    "xtick.color": _GRID,
    "xtick.labelcolor": _TEXT,
    "ytick.color": _GRID,
    "ytick.labelcolor": _TEXT,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Line:
    """A line of a chart, as its legend has it.

    Attributes:
        label: what the line shows.
        series: its colour, as the style sheet names it: model, train, mean or interpolation.
        dashed: whether it is a level to compare with, drawn dashed, rather than a curve.
    """

    label: str
    series: str
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: what it shows.
        alt: a sentence that states its numbers, for those who cannot see it; also the SVG's label.
        svg: the drawing, an `<svg>` element to be placed in an HTML page as it is.
        legend: what the lines are; empty where the title says it.
    """

    title: str
    alt: str
    svg: str
    legend: tuple[Line, ...] = ()


def loss_chart(train: Records, val: Records, target: str | None = None) -> Chart | None:
    """Training and validation loss over steps, beside the losses of the trivial predictors; None without data.

    Args:
        train: training records.
        val: validation records, which are of the first target.
        target: the name of a further target, which has no validation loss; None: the first.
    """
    key, title = ("loss", "Loss") if target is None else (f"loss_{target}", f"Training loss of the target {target}")
    val = val if target is None else []
    series = {
        Line("training", "train"): series_of(train, key),
        Line("held-out images", "model"): series_of(val, "loss"),
        Line("interpolation", "interpolation", dashed=True): series_of(val, "loss_interpolation"),
        Line("mean patch", "mean", dashed=True): series_of(val, "loss_mean_patch"),
    }
    series = _non_empty(series)
    if not series:
        return None
    alt = _sentence(f"{title} over steps", series, number)

    def draw(figure: Figure) -> None:
        axes = step_axes(figure.add_subplot())
        _draw_lines(axes, series)
        axes.set_ylim(0, 1.06 * max(_ceiling(line, y) for line, (_, y) in series.items()))

    return Chart(title, alt, to_svg(draw, key, alt), tuple(series))


def variance_chart(val: Records) -> Chart | None:
    """Explained variance over steps, beside interpolation's; None without data."""
    series = _non_empty(
        {
            Line("this model", "model"): series_of(val, "explained_variance"),
            Line("interpolation", "interpolation", dashed=True): series_of(val, "explained_variance_interpolation"),
        }
    )
    if not series:
        return None
    alt = _sentence("Explained variance of what is hidden over steps", series, percent)

    def draw(figure: Figure) -> None:
        axes = step_axes(figure.add_subplot())
        _draw_lines(axes, series)
        low = min(float(y.min()) for _, y in series.values())
        high = max(float(y.max()) for _, y in series.values())
        axes.set_ylim(min(0.0, 1.1 * low), max(min(1.0, 1.15 * high), 0.1))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f}%"))

    return Chart("Explained variance", alt, to_svg(draw, "variance", alt), tuple(series))


def accuracy_chart(val: Records, key: str, untrained: float | None, pixels: float | None) -> Chart | None:
    """Accuracy of a classifier on the features over steps, beside its baselines; None where it was never measured.

    Args:
        val: validation records; those with `key` are drawn.
        key: "knn" or "linear".
        untrained: percent, for the network before training, drawn as a level line.
        pixels: percent, for raw pixels, likewise.
    """
    steps, accuracy = series_of(val, key)
    if not len(steps):
        return None
    series = {Line("this model", "model"): (steps, accuracy)}
    if pixels is not None:
        series[Line("raw pixels", "interpolation", dashed=True)] = (np.zeros(1), np.array([pixels]))
    if untrained is not None:
        series[Line("untrained network", "mean", dashed=True)] = (np.zeros(1), np.array([untrained]))
    title = ACCURACIES[key]
    alt = _sentence(f"{title} over steps", series, lambda y: f"{y:.1f}%")

    def draw(figure: Figure) -> None:
        axes = step_axes(figure.add_subplot())
        _draw_lines(axes, series)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0f}%"))
        low = min(float(y.min()) for _, y in series.values())
        high = max(float(y.max()) for _, y in series.values())
        margin = max(0.15 * (high - low), 2.0)
        axes.set_ylim(max(0.0, low - margin), min(100.0, high + margin))

    return Chart(title, alt, to_svg(draw, key, alt), tuple(series))


def rank_chart(val: Records, untrained: float | None) -> Chart | None:
    """Effective rank of the features over steps; None where it was never measured.

    Args:
        val: validation records; those with "effective_rank" are drawn.
        untrained: of the network before training, drawn as a level line.
    """
    series = _non_empty({Line("this model", "model"): series_of(val, "effective_rank")})
    if not series:
        return None
    if untrained is not None:
        series[Line("untrained network", "mean", dashed=True)] = (np.zeros(1), np.array([untrained]))
    alt = _sentence("Directions that the features use, in effect, over steps", series, lambda y: f"{y:.1f}")

    def draw(figure: Figure) -> None:
        axes = step_axes(figure.add_subplot())
        _draw_lines(axes, series)
        axes.set_ylim(0, 1.15 * max(float(y.max()) for _, y in series.values()) or 1.0)

    return Chart("Effective rank of the features", alt, to_svg(draw, "rank", alt), tuple(series))


def learning_rate_chart(train: Records) -> Chart | None:
    """Learning rate over steps; None without data."""
    steps, rate = series_of(train, "lr")
    if not len(steps):
        return None
    peak = int(rate.argmax())
    alt = (
        f"Learning rate over steps: highest at step {steps[peak]:,.0f} with {rate[peak]:.3g}, "
        f"at the end {rate[-1]:.3g}."
    )

    def draw(figure: Figure) -> None:
        axes = step_axes(figure.add_subplot())
        _draw_lines(axes, {Line("learning rate", "model"): (steps, rate)})
        axes.set_ylim(0, 1.1 * float(rate.max()) or 1.0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.2g}"))

    return Chart("Learning rate", alt, to_svg(draw, "rate", alt))


def step_size_chart(train: Records) -> Chart | None:
    """How far a step moves the weights, and the norm of the gradient, one above the other; None without data."""
    update_steps, update = series_of(train, "update_to_weight")
    norm_steps, norm = series_of(train, "grad_norm")
    if not len(update_steps) or not len(norm_steps):
        return None
    alt = (
        f"Size of the steps: a step changes the weight matrices by {percent(float(np.median(update)))} of their norm "
        f"(median), at most {percent(float(update.max()))}; gradient norm from {number(float(norm[0]))} to "
        f"{number(float(norm[-1]))}, median {number(float(np.median(norm)))}."
    )

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2]})
        _draw_lines(upper, {Line("update to weight", "model"): (update_steps, update)})
        _draw_lines(step_axes(lower), {Line("gradient norm", "interpolation"): (norm_steps, norm)})
        for axes, values, show in ((upper, update, lambda y: f"{100 * y:.2g}%"), (lower, norm, lambda y: f"{y:.3g}")):
            # The gradients of the first steps are many times those of all others.
            axes.set_ylim(0, 1.15 * float(np.percentile(values, 98)) or 1.0)
            axes.yaxis.set_major_locator(MaxNLocator(3))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _, show=show: show(y)))

    legend = (Line("change of the weights in a step", "model"), Line("gradient norm", "interpolation"))
    return Chart("Size of the steps", alt, to_svg(draw, "steps", alt), legend)


def throughput_chart(train: Records) -> Chart | None:
    """Images a second and the share of time spent waiting for data, one above the other; None without data."""
    steps, speed = series_of(train, "images_per_s")
    wait_steps, wait = series_of(train, "data_wait")
    if not len(steps) or not len(wait_steps):
        return None
    alt = (
        f"Throughput over steps: median {np.median(speed):,.0f} images per second, from {speed.min():,.0f} to "
        f"{speed.max():,.0f}; waiting for data took {percent(float(wait.mean()))} of the time on average."
    )

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2]})
        _draw_lines(upper, {Line("images per second", "model"): (steps, speed)})
        _draw_lines(step_axes(lower), {Line("waiting for data", "interpolation"): (wait_steps, wait)})
        upper.set_ylim(0, 1.15 * float(speed.max()) or 1.0)
        upper.yaxis.set_major_locator(MaxNLocator(3))
        upper.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
        lower.set_ylim(0, min(1.0, max(0.05, 1.2 * float(wait.max()))))
        lower.yaxis.set_major_locator(MaxNLocator(2))
        lower.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f}%"))

    legend = (Line("images per second", "model"), Line("share of time waiting for data", "interpolation"))
    return Chart("Throughput", alt, to_svg(draw, "throughput", alt), legend)


def series_of(records: Records, key: str) -> tuple[Points, Points]:
    """(steps, values) of the records that have a finite value under `key`."""
    pairs = [(float(record["step"]), value) for record in records if (value := finite(record, key)) is not None]
    points = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _non_empty(series: Mapping[Line, tuple[Points, Points]]) -> dict[Line, tuple[Points, Points]]:
    return {line: points for line, points in series.items() if len(points[0])}


def thin(points: tuple[Points, Points]) -> tuple[Points, Points]:
    """At most 400 points: each the mean of its neighbours, which is also a kinder view of a noisy loss."""
    steps, values = points
    if len(steps) <= _MAX_POINTS:
        return points
    return (
        np.array([part.mean() for part in np.array_split(steps, _MAX_POINTS)]),
        np.array([part.mean() for part in np.array_split(values, _MAX_POINTS)]),
    )


def _ceiling(line: Line, values: Points) -> float:
    """The height that a line needs. The spike of a training loss's first steps would flatten everything else."""
    return float(np.percentile(values, 98)) if line.series == "train" else float(values.max())


def _sentence(subject: str, series: Mapping[Line, tuple[Points, Points]], show: Callable[[float], str]) -> str:
    """What a chart says: where each line starts and ends."""
    parts = []
    for line, (_, values) in series.items():
        first, last = show(float(values[0])), show(float(values[-1]))
        parts.append(f"{line.label} {last}" if first == last else f"{line.label} from {first} to {last}")
    return f"{subject}: {'; '.join(parts)}."


def step_axes(axes: Axes, label: str = "step") -> Axes:
    """Gives axes a horizontal axis of counts in few characters, and room for their labels; returns them."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _short(step)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return axes


def _short(step: float) -> str:
    """A count in few characters: 800, 9500, 40k, 1.5M."""
    if step >= 1e6:
        return f"{step / 1e6:g}M"
    return f"{step / 1e3:g}k" if step >= 1e4 else f"{step:g}"


def _draw_lines(axes: Axes, series: Mapping[Line, tuple[Points, Points]]) -> None:
    for line, points in series.items():
        # What needs no training is measured under a fixed mask: it is a level, not a curve.
        if line.dashed:
            axes.axhline(float(points[1][-1]), color=_SERIES[line.series], linewidth=1.5, linestyle="--")
            continue
        steps, values = thin(points)
        marker = "o" if line.series == "model" and len(steps) <= 30 else ""
        width = 1.2 if line.series == "train" else 1.8
        axes.plot(steps, values, color=_SERIES[line.series], linewidth=width, marker=marker, markersize=3.5)
    axes.margins(x=0.015)
    axes.set_xlim(left=0)


def to_svg(draw: Callable[[Figure], None], name: str, alt: str) -> str:
    """Renders a figure and makes its SVG fit to stand inside a page.

    Args:
        draw: fills the empty figure.
        name: a prefix that keeps the identifiers of several charts on one page apart.
        alt: the drawing's label.
    """
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=_SIZE, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    return _inline(buffer.getvalue(), name, alt)


def _inline(text: str, name: str, alt: str) -> str:
    """An SVG document as an element of an HTML page: no prologue, no style rule, no font, no colour of its own."""
    body = text[text.index(">", text.index("<svg")) + 1 :]
    # matplotlib's one style rule selects *, which would reach the whole page.
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r" transform=\"rotate\(-0 [^\"]*\)\"", "", body)
    body = re.sub(r"<g id=\"[^\"]*\"(/?)>", r"<g\1>", body).replace("<g/>", "")
    body = re.sub(r"(id=\"|#)([mp][0-9a-f]{10})\b", rf"\g<1>{name}-\g<2>", body)
    # Coordinates to a tenth of a unit; inside tags only, for the labels are numbers too.
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"\d+\.\d{2,}", _to_tenths, tag[0]), body)
    for colour, css in _CSS.items():
        body = body.replace(colour, css)
    body = re.sub(r"\s+", " ", body).replace("> <", "><").strip()
    width, height = (round(72 * inches) for inches in _SIZE)
    label = escape(alt, quote=True)
    return f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}">{body}'


def _to_tenths(coordinate: re.Match[str]) -> str:
    return f"{float(coordinate[0]):.1f}".removesuffix(".0")
