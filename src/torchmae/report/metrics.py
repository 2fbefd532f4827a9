"""METRICS: each figure's name in words, unit, direction and baselines, for tables, pages, model cards and JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


def percent(share: float) -> str:
    """A share as percent: 0.618 -> "61.8%"."""
    return f"{100 * share:.1f}%"


def number(value: float) -> str:
    """A loss in four significant digits at most, without exponent where it can be: 0.4123."""
    return f"{value:.3f}" if 0.1 <= abs(value) < 1000 else f"{value:.3g}"


def _any_number(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


@dataclass(frozen=True)
class Unit:
    """What a figure is measured in.

    Attributes:
        name: the head of a table; figures of one unit can stand in one table.
        cell: a figure as text under that head.
        text: a figure as text that stands alone.
        sign: behind the numbers of a chart's axis.
        scale: what a figure is multiplied by for that axis.
        is_share: whether a figure is drawn as a bar, from nothing to 100%.
    """

    name: str
    cell: Callable[[float], str] = _any_number
    text: Callable[[float], str] = _any_number
    sign: str = ""
    scale: float = 1.0
    is_share: bool = False


LOSS = Unit("Loss", "{:.4f}".format, number)
SHARE = Unit("Share", "{:.3f}".format, percent, "%", 100, is_share=True)
ACCURACY = Unit("Accuracy, %", "{:.1f}".format, "{:.1f}%".format, "%", is_share=True)
AUROC = Unit("AUROC", "{:.3f}".format)
SEGMENTATION = Unit("Segmentation, %", "{:.1f}".format, "{:.1f}%".format, "%", is_share=True)
COUNT = Unit("Count", "{:,.0f}".format, "{:,.0f}".format)
TRAINING = Unit("Training")
"""What a fine-tuning took: said beside its accuracy, not in a table of its own."""
OTHER = Unit("Figure")


@dataclass(frozen=True)
class Metric:
    """A figure.

    Attributes:
        label: in words; a word in braces is a group of the name's pattern.
        unit: what it is measured in.
        best: min or max; None: it cannot be ranked.
        baselines: what is measured in the model's place, as `NAME_BASELINE`; keys of `BASELINES`.
        goal: what it says of a run, a key of `GOALS`; the tables of a run's figures show it. Empty: only its curve.
        chart: of a figure of training, the chart that it is drawn in.
        settings: that it depends on, beside those of its goal.
    """

    label: str
    unit: Unit
    best: Callable[[Sequence[float]], float] | None = None
    baselines: tuple[str, ...] = ()
    goal: str = ""
    chart: str = ""
    settings: tuple[str, ...] = ()

    @property
    def heading(self) -> str:
        """The label, with the unit where figures without one follow."""
        return f"{self.label}, %" if self.unit is ACCURACY else self.label


BASELINES = {
    "interpolation": "interpolation",
    "mean_patch": "the mean patch",
    "untrained": "the untrained network",
    "pixels": "raw pixels",
}


class Goal(NamedTuple):
    """What figures of a run say of it: a table's caption and first head, and the settings that they depend on."""

    caption: str
    head: str
    settings: tuple[str, ...]


_HELD_OUT = ("data.source", "data.val", "data.val_size")
GOALS = {
    "reconstruction": Goal(
        "Filling in what is hidden", "Predictor", (*_HELD_OUT, "eval.images", "mask.strategy", "mask.ratio")
    ),
    "features": Goal(
        "Telling classes apart",
        "Features of",
        (*_HELD_OUT, "eval.knn_train", "eval.knn_val"),
    ),
}
_TRIVIAL, _UNLEARNED = ("interpolation", "mean_patch"), ("pixels", "untrained")
_MASK = r"(?P<strategy>\w+)_(?P<share>[\d.]+)"

METRICS: dict[str, Metric] = {
    # Measured while a run trains.
    "loss": Metric("Loss", LOSS, min, _TRIVIAL, "reconstruction"),
    "explained_variance": Metric("Explained variance", SHARE, max, _TRIVIAL, "reconstruction"),
    "knn": Metric("kNN accuracy", ACCURACY, max, _UNLEARNED, "features"),
    "linear": Metric("Linear probe accuracy", ACCURACY, max, _UNLEARNED, "features", settings=("eval.linear_train",)),
    "effective_rank": Metric("Effective rank of the features", OTHER, None, ("untrained",)),
    "lr": Metric("Learning rate", OTHER, chart="Learning rate"),
    "update_to_weight": Metric(
        "Change of the weights in a step",
        Unit("Share", text="{:.2%}".format, sign="%", scale=100),
        chart="Size of the steps",
    ),
    "grad_norm": Metric("Gradient norm", LOSS, chart="Size of the steps"),
    "images_per_s": Metric("Images per second", COUNT, chart="Throughput"),
    "data_wait": Metric("Share of time waiting for data", SHARE, chart="Throughput"),
    # By `torchmae evaluate`.
    r"knn(?P<k>\d+)": Metric("kNN, k = {k}", ACCURACY, max),
    r"linear_(?P<pool>mean|cls|both)": Metric("linear probe, {pool}", ACCURACY, max),
    r"linear_c(?P<c>[\d.]+)": Metric("linear probe, patch mean, C = {c}", ACCURACY, max),
    r"linear_paper_(?P<pool>mean|cls|both)": Metric("linear probe, as in the paper, {pool}", ACCURACY, max),
    "attentive": Metric("attentive probe", ACCURACY, max),
    "finetune": Metric("fine-tuned", ACCURACY, max, goal="features"),
    "finetune_random": Metric("trained from random weights", ACCURACY, max),
    r"finetune_(?:random_)?(?P<took>images|seconds|loss)": Metric("{took}", TRAINING),
    "segmentation_miou": Metric("mean IoU", SEGMENTATION, max),
    "segmentation_accuracy": Metric("pixel accuracy", SEGMENTATION, max),
    "segmentation_finetune_miou": Metric("mean IoU, fine-tuned", SEGMENTATION, max),
    "segmentation_finetune_accuracy": Metric("pixel accuracy, fine-tuned", SEGMENTATION, max),
    r"segmentation_finetune_(?P<took>images|seconds|loss)": Metric("{took}", TRAINING),
    "anomaly_reconstruction": Metric("reconstruction error", AUROC, max),
    "anomaly_reconstruction_max": Metric("reconstruction error, worst patch", AUROC, max),
    "anomaly_knn": Metric("kNN distance of the mean feature", AUROC, max),
    "anomaly_patch_knn": Metric("kNN distance of patches", AUROC, max),
    "anomaly_patch_knn_max": Metric("kNN distance, oddest patch", AUROC, max),
    f"{_MASK}_psnr": Metric("{strategy}, {share}% hidden", Unit("PSNR, dB", "{:.2f}".format), max, ("interpolation",)),
    f"{_MASK}_ssim": Metric("{strategy}, {share}% hidden", Unit("SSIM", "{:.3f}".format), max, ("interpolation",)),
    f"{_MASK}_explained_variance": Metric(
        "{strategy}, {share}% hidden", Unit("Explained variance", "{:.3f}".format), max, ("interpolation",)
    ),
}
"""The only list of figures, by name; a name with parts that vary is a regular expression for the whole of it."""

_POOLS = {"mean": "patch mean", "cls": "class token"}


def metrics_of(goal: str) -> dict[str, Metric]:
    """The figures that say something of a run, by name."""
    return {name: metric for name, metric in METRICS.items() if metric.goal == goal}


def charts_of_training() -> dict[str, list[str]]:
    """The figures of training that are drawn together, by the title of their chart."""
    charts: dict[str, list[str]] = {}
    for name, metric in METRICS.items():
        if metric.chart:
            charts.setdefault(metric.chart, []).append(name)
    return charts


class Measure(NamedTuple):
    """What a figure's name stands for; `beside` is what predicted in the model's place; else empty."""

    unit: Unit
    label: str
    beside: str = ""


class Figure(NamedTuple):
    """A cell of a table; what is unknown is empty.

    Attributes:
        value: a figure as text.
        spread: how sure it is: an interval or a deviation.
        top5: of an accuracy, that of five guesses.
        bar: of a share, the length of its bar in percent.
        best: whether it is the best of its row.
    """

    value: str = ""
    spread: str = ""
    top5: str = ""
    bar: float | None = None
    best: bool = False


class Row(NamedTuple):
    """A row of a table; `kind` is a class of the style sheet: ours or beside."""

    label: str
    cells: tuple[Figure, ...]
    kind: str = ""


class Table(NamedTuple):
    """A table: what stands above its rows' labels and above each column."""

    head: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    caption: str = ""


def measure_of(name: str) -> Measure:
    """What a figure's name stands for; one that is not known stands for itself."""
    for pattern, metric in METRICS.items():
        found = re.fullmatch(f"{pattern}(?:_(?P<beside>{'|'.join(metric.baselines)}))?", name)
        if found:
            parts = found.groupdict()
            beside = BASELINES.get(parts.pop("beside") or "", "")
            if "share" in parts:
                parts["share"] = f"{100 * float(parts['share']):g}"
            return Measure(
                metric.unit, metric.label.format(**{key: _POOLS.get(part, part) for key, part in parts.items()}), beside
            )
    return Measure(OTHER, name)


def figures_as_text(figures: Mapping[str, float]) -> dict[str, Figure]:
    """Figures by name; NAME_low, NAME_high, NAME_std and NAME_top5 go with the figure that they belong to."""
    texts = {}
    for name, value in figures.items():
        stem = re.sub(r"_(low|high|std|top5)$", "", name)
        if stem != name and stem in figures:
            continue
        show = measure_of(name).unit.cell
        low, high, deviation, top5 = (figures.get(f"{name}_{end}") for end in ("low", "high", "std", "top5"))
        spread = "" if deviation is None else f"± {show(deviation)}"
        if low is not None and high is not None:
            spread = f"{show(low)} to {show(high)}"
        texts[name] = Figure(show(value), spread, "" if top5 is None else show(top5))
    return texts


def finite(record: Mapping[str, Any], key: str) -> float | None:
    """The number under `key`, or None if it is missing, null, NaN, infinite or no number."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def final_figures(
    summary: Mapping[str, Any],
    val: Sequence[Mapping[str, Any]],
    baseline: Sequence[Mapping[str, Any]] = (),
    knn_limit: int | None = None,
) -> dict[str, float]:
    """The figures a run ended with, by name: its summary's, else those of the last record by rising step that has them.

    Args:
        summary: summary.json; may be empty.
        val: validation records; may be empty.
        baseline: records of what needs no training, likewise.
        knn_limit: the setting eval.knn_val, at most which many held-out images are classified.

    Returns:
        What was measured of `METRICS` and their baselines, `step` of the last loss, and `knn_images` classified.
    """
    figures = {}
    for name, metric in METRICS.items():
        for key in (name, *(f"{name}_{baseline}" for baseline in metric.baselines)):
            values = (finite(record, key) for record in (summary, *reversed(val), *reversed(baseline)))
            if (value := next((value for value in values if value is not None), None)) is not None:
                figures[key] = value
    if figures.keys() >= {"loss", "loss_mean_patch", "explained_variance"} and figures["loss"] > 0:
        ratio = figures["loss_mean_patch"] / figures["loss"]
        figures["explained_variance_mean_patch"] = 1 - ratio * (1 - figures["explained_variance"])
    if measured := [record["step"] for record in val if finite(record, "loss") is not None]:
        figures["step"] = measured[-1]
    if num_val := finite(summary, "num_val"):
        figures["knn_images"] = int(num_val if knn_limit is None else min(num_val, knn_limit))
    return figures
