"""METRICS: label, unit, direction and baselines of every figure, for tables, pages and model cards."""

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
    """A loss in three significant digits or three decimals: 0.412."""
    return f"{value:.3f}" if 0.1 <= abs(value) < 1000 else f"{value:.3g}"


def _any_number(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


@dataclass(frozen=True)
class Unit:
    """The unit of a figure.

    Attributes:
        name: heads a table; one table holds figures of one unit.
        cell: formats a figure in such a table.
        text: formats a figure elsewhere.
        sign: follows the numbers on a chart's axis.
        scale: factor for the numbers on a chart's axis.
        is_share: draw a bar from 0 to 100%.
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
CLASS_AUROC = Unit("AUROC, mean of the classes", "{:.3f}".format)
MAP = Unit("Average precision, mean of the classes", "{:.3f}".format)
AUPRO = Unit("AUPRO (false positive rates up to 0.3)", "{:.3f}".format)
SEGMENTATION = Unit("Segmentation, %", "{:.1f}".format, "{:.1f}%".format, "%", is_share=True)
COUNT = Unit("Count", "{:,.0f}".format, "{:,.0f}".format)
TRAINING = Unit("Training")
"""The effort of a fine-tuning; shown beside its accuracy, not in a table."""
OTHER = Unit("Figure")


@dataclass(frozen=True)
class Metric:
    """A row of `METRICS`.

    Attributes:
        label: in words; {group} is replaced by a group of the name's pattern.
        unit: of the figure.
        best: min or max; None: no order.
        baselines: keys of `BASELINES`; the baseline's figure is called `NAME_BASELINE`.
        goal: a key of `GOALS`, the table of a run that shows the figure; empty: only its curve is drawn.
        chart: title of the chart of a training figure.
        settings: settings that the figure depends on, in addition to those of its goal.
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
        """The label, with "%" for an accuracy."""
        return f"{self.label}, %" if self.unit is ACCURACY else self.label


BASELINES = {
    "interpolation": "interpolation",
    "mean_patch": "the mean patch",
    "untrained": "the untrained network",
    "pixels": "raw pixels",
}


class Goal(NamedTuple):
    """A table of a run's figures: caption, first heading, and the settings that its figures depend on."""

    caption: str
    head: str
    settings: tuple[str, ...]


_HELD_OUT = ("data.source", "data.val", "data.val_size")
GOALS = {
    "reconstruction": Goal(
        "Filling in what is masked", "Predictor", (*_HELD_OUT, "eval.images", "mask.strategy", "mask.ratio")
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
    "majority": Metric("always the commonest class", ACCURACY),
    r"(?P<of>[\w.]+)_macro": Metric("{of}, mean of the classes", ACCURACY, max),
    r"knn(?P<k>\d+)": Metric("kNN, k = {k}", ACCURACY, max),
    r"linear_(?P<pool>mean|cls|both)": Metric("linear probe, {pool}", ACCURACY, max),
    r"linear_c(?P<c>[\d.]+)": Metric("linear probe, patch mean, C = {c}", ACCURACY, max),
    r"linear_paper_(?P<pool>mean|cls|both)": Metric("linear probe, as in the paper, {pool}", ACCURACY, max),
    r"(?P<of>[\w.]+)_map": Metric("{of}", MAP, max),
    r"(?P<of>[\w.]+)_auroc": Metric("{of}", CLASS_AUROC, max),
    "attentive": Metric("attentive probe", ACCURACY, max),
    "finetune": Metric("fine-tuned", ACCURACY, max, goal="features"),
    "finetune_random": Metric("trained from random weights", ACCURACY, max),
    r"finetune_(?:random_)?(?P<took>images|seconds|loss)": Metric("{took}", TRAINING),
    "segmentation_miou": Metric("mean IoU", SEGMENTATION, max),
    "segmentation_foreground": Metric("IoU of the foreground", SEGMENTATION, max),
    "segmentation_accuracy": Metric("pixel accuracy", SEGMENTATION, max),
    "segmentation_finetune_miou": Metric("mean IoU, fine-tuned", SEGMENTATION, max),
    "segmentation_finetune_foreground": Metric("IoU of the foreground, fine-tuned", SEGMENTATION, max),
    "segmentation_finetune_accuracy": Metric("pixel accuracy, fine-tuned", SEGMENTATION, max),
    r"segmentation_finetune_(?P<took>images|seconds|loss)": Metric("{took}", TRAINING),
    "anomaly_reconstruction": Metric("reconstruction error", AUROC, max),
    "anomaly_reconstruction_max": Metric("reconstruction error, worst patch", AUROC, max),
    "anomaly_knn": Metric("kNN distance of the mean feature", AUROC, max),
    "anomaly_patch_knn": Metric("kNN distance of patches", AUROC, max),
    "anomaly_patch_knn_max": Metric("kNN distance, oddest patch", AUROC, max),
    "anomaly_reconstruction_pixel": Metric("reconstruction error, pixels", AUROC, max),
    "anomaly_patch_knn_pixel": Metric("kNN distance of patches, pixels", AUROC, max),
    "anomaly_reconstruction_aupro": Metric("AUPRO, reconstruction error", AUPRO, max),
    "anomaly_patch_knn_aupro": Metric("AUPRO, kNN distance of patches", AUPRO, max),
    f"{_MASK}_psnr": Metric("{strategy}, {share}% masked", Unit("PSNR, dB", "{:.2f}".format), max, ("interpolation",)),
    f"{_MASK}_ssim": Metric("{strategy}, {share}% masked", Unit("SSIM", "{:.3f}".format), max, ("interpolation",)),
    f"{_MASK}_explained_variance": Metric(
        "{strategy}, {share}% masked", Unit("Explained variance", "{:.3f}".format), max, ("interpolation",)
    ),
}
"""Every figure by name; a key may be a regular expression of the whole name."""

_POOLS = {"mean": "patch mean", "cls": "class token"}


def metrics_of(goal: str) -> dict[str, Metric]:
    """The figures of a goal, by name."""
    return {name: metric for name, metric in METRICS.items() if metric.goal == goal}


def charts_of_training() -> dict[str, list[str]]:
    """The training figures of each chart, by the chart's title."""
    charts: dict[str, list[str]] = {}
    for name, metric in METRICS.items():
        if metric.chart:
            charts.setdefault(metric.chart, []).append(name)
    return charts


class Measure(NamedTuple):
    """Unit and label of a figure; `beside` is the baseline that it was measured on, empty for the model."""

    unit: Unit
    label: str
    beside: str = ""


class Figure(NamedTuple):
    """A cell of a table: a figure, its interval or deviation, its top-5 accuracy, all as text; empty where unknown.

    `bar` is the length of a share's bar in percent, `best` marks the best figure of a row.
    """

    value: str = ""
    spread: str = ""
    top5: str = ""
    bar: float | None = None
    best: bool = False


class Row(NamedTuple):
    """A row of a table; `kind` is a class of the style sheet: "ours" (the model) or "beside" (a baseline)."""

    label: str
    cells: tuple[Figure, ...]
    kind: str = ""


class Table(NamedTuple):
    """A table: heading of the rows' labels, heading of each column, rows, caption."""

    head: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    caption: str = ""


def measure_of(name: str) -> Measure:
    """The unit and label of a figure's name; an unknown name is its own label."""
    for pattern, metric in METRICS.items():
        found = re.fullmatch(f"{pattern}(?:_(?P<beside>{'|'.join(metric.baselines)}))?", name)
        if found:
            parts = found.groupdict()
            beside = BASELINES.get(parts.pop("beside") or "", "")
            if "of" in parts:
                parts["of"] = measure_of(parts["of"]).label
            if "share" in parts:
                parts["share"] = f"{100 * float(parts['share']):g}"
            return Measure(
                metric.unit, metric.label.format(**{key: _POOLS.get(part, part) for key, part in parts.items()}), beside
            )
    return Measure(OTHER, name)


def figures_as_text(figures: Mapping[str, float]) -> dict[str, Figure]:
    """Figures as text by name; NAME_low, NAME_high, NAME_std and NAME_top5 become parts of the cell of NAME."""
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
    """The number under `key`; None if it is missing, NaN, infinite or no number."""
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
    """The figures of `METRICS` and their baselines at the end of a run, by name; a figure without a value is left out.

    A figure is that of `summary` (summary.json), else of the last record that has it; `val` and `baseline` are records
    of metrics.jsonl by rising step. Adds `step`, of the last loss, and `knn_images`, the number of images of the kNN
    accuracy: all held-out images, at most `knn_limit` (the setting eval.knn_val).
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
