"""The report of a run: one self-contained HTML page without network, script or font."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np

from torchmae.files import replace_file
from torchmae.report.charts import Chart, Line, Panel, chart, level, series_of
from torchmae.report.evaluations import latest_evaluations
from torchmae.report.metrics import (
    ACCURACY,
    BASELINES,
    GOALS,
    LOSS,
    METRICS,
    Figure,
    Row,
    Table,
    Unit,
    charts_of_training,
    metrics_of,
)
from torchmae.report.page import Embedded, embed, load_titled, open_picture, render_page
from torchmae.report.pictures import HEADERS, read_layout, split_columns, strip_grid
from torchmae.report.run import Record, Run, load_run, yaml_text
from torchmae.report.verdict import judge, training_hints, trend
from torchmae.settings import default_values

# Reconstructions shown side by side, from the first to the last.
_MAX_MOMENTS = 4
_MAX_BAD_FILES = 20
# Baselines whose line has the first colour, and the longer names of baselines in a table.
_FIRST = ("interpolation", "pixels")
_PREDICTORS = {
    "interpolation": "Interpolation from visible {unit}",
    "mean_patch": "Mean of visible {unit}",
    "untrained": "The same network, untrained",
}

_ENVIRONMENT_LABELS = {"torch": "PyTorch", "torchmae": "torchmae", "torchvision": "torchvision"}


class Reconstructions(NamedTuple):
    """Reconstructions of held-out images: the picture of `step`, cut into columns, and the progress of training.

    `headers` stand above each third of a column; they are empty if the picture has its own. `note` describes how the
    reconstruction was made. `progress` shows masked images, reconstructions at `progress_steps`, originals.
    """

    step: int
    columns: tuple[Embedded, ...]
    headers: tuple[str, ...]
    pixelated: bool
    note: str
    progress: Embedded | None
    progress_steps: tuple[int, ...]


class Setting(NamedTuple):
    """A line of the configuration as YAML, and whether it differs from torchmae's default."""

    name: str
    value: str
    changed: bool


def write_report(run: Path, page: Path | None = None) -> Path:
    """Writes the report of a run folder, by default as RUN/report.html; the same folder gives the same bytes.

    Commands on the page name the folder as `run` does.

    Raises:
        CheckpointError: the folder is no run, cannot be read, or cannot be written to.
    """
    page = run / "report.html" if page is None else page
    replace_file(page, render(load_run(run)).encode("utf-8"))
    return page


def render(run: Run) -> str:
    """The page of a run, as HTML."""
    figures, folder = run.figures, run.path.as_posix()
    evaluations, evaluations_left = latest_evaluations(run.evaluations)
    return render_page(
        "run.html",
        kind=run.kind,
        run=run,
        title=run.title,
        verdict=judge(figures, run.unit),
        trend=trend(run.val),
        hints=training_hints(run.records),  # the verdict covers the loss
        scores=score_tables(figures, run.unit) if "loss" in figures else [],
        figures=figures,
        linear_train=run.settings.get("eval.linear_train"),
        normalised=run.summary.get("target") == "normalised patches",
        unit=run.unit,
        pictures=load_reconstructions(run),
        evaluations=evaluations,
        evaluations_left=evaluations_left,
        learned=[picture for path in run.feature_pictures if (picture := load_titled(path)) is not None],
        charts=_charts(run, figures),
        settings=settings(run.config),
        environment=[
            (_ENVIRONMENT_LABELS.get(key) or key.replace("_", " ").capitalize(), str(value))
            for key, value in run.environment.items()
            if value is not None
        ],
        max_bad_files=_MAX_BAD_FILES,
        folder=shlex.quote(folder),
        folder_literal=repr(folder),
        again=shlex.quote(f"{folder}-again"),
        version=run.environment.get("torchmae"),
    )


def score_tables(figures: Mapping[str, float], unit: str) -> list[Table]:
    """A table for each goal: its measured figures, beside their baselines."""
    tables = []
    for name, goal in GOALS.items():
        shown = {key: metric for key, metric in metrics_of(name).items() if key in figures}
        labels = {"": "This model"}
        for key in (key for metric in shown.values() for key in metric.baselines):
            labels[f"_{key}"] = _PREDICTORS.get(key, BASELINES[key].capitalize()).format(unit=unit)
        rows = [
            Row(
                label,
                tuple(_cell(metric.unit, figures.get(f"{key}{ending}")) for key, metric in shown.items()),
                "" if ending else "ours",
            )
            for ending, label in labels.items()
            if any(f"{key}{ending}" in figures for key in shown)
        ]
        if rows:
            heads = tuple(metric.label.removesuffix(" accuracy") for metric in shown.values())
            tables.append(Table(goal.head, heads, tuple(rows), goal.caption))
    return tables


def load_reconstructions(run: Run) -> Reconstructions | None:
    """The last picture of a run and its progress; None if no picture can be read."""
    moments = sorted({*np.linspace(0, len(run.pictures) - 1, _MAX_MOMENTS).round().astype(int)} if run.pictures else ())
    opened = [(step, open_picture(path)) for step, path in (run.pictures[i] for i in moments)]
    readable = [(step, picture) for step, picture in opened if picture is not None]
    if not readable:
        return None
    step, last = readable[-1]
    layout = read_layout(last)
    progress = strip_grid([picture for _, picture in readable]) if len(readable) > 1 else None
    return Reconstructions(
        step=step,
        columns=tuple(embed(column) for column in split_columns(last)),
        headers=HEADERS if layout else (),
        pixelated=layout is not None and layout.scale > 1,
        note=layout.note if layout else "",
        progress=embed(progress) if progress else None,
        progress_steps=tuple(step for step, _ in readable),
    )


def settings(config: Record) -> list[tuple[str, list[Setting]]]:
    """The configuration as (section, lines of YAML); top-level values have the section ""."""
    defaults = default_values()
    sections: dict[str, list[Setting]] = {"": []}
    for section, values in config.items():
        nested = isinstance(values, dict)
        known = defaults.get(section, {}) if nested else defaults
        for name, value in values.items() if nested else ((section, values),):
            line = Setting(str(name), yaml_text(value), value != known.get(name, ...))
            sections.setdefault(section if nested else "", []).append(line)
    return [(str(section), lines) for section, lines in sections.items() if lines]


def _cell(unit: Unit, value: float | None) -> Figure:
    """A figure as text, and the bar of a share."""
    text = "" if value is None else unit.text(value).replace("-", "\N{MINUS SIGN}")
    bar = round(min(max((value or 0.0) * unit.scale, 0.0), 100.0), 1)
    return Figure(text, bar=bar if unit.is_share else None)


def _heading(name: str) -> str:
    """The heading of the chart of a loss that is measured in training only."""
    if name == "loss_contrast":
        return "Training loss of the comparison of views"
    return f"Training loss of the target {name.removeprefix('loss_')}"


def _charts(run: Run, figures: Mapping[str, float]) -> list[Chart]:
    """Charts of figures on held-out images, of the training losses of other targets, and of training."""

    def trained(name: str, label: str = "training", colour: str = "train") -> Line:
        return Line(label, colour, *series_of(run.train, name))

    others = sorted({name for record in run.train for name in record if name.startswith("loss_")})
    # Older versions logged the weighted sum of all targets' losses, which no held-out loss can be compared with.
    summed = bool(run.settings.get("model.hog_weight")) and not others
    held_out = {}
    for name, metric in METRICS.items():
        lines = [trained("loss")] if name == "loss" and not summed else []
        lines.append(Line("held-out images" if name == "loss" else "this model", "model", *series_of(run.val, name)))
        for key in metric.baselines:
            colour = "interpolation" if key in _FIRST else "mean"
            lines.append(level(BASELINES[key], figures.get(f"{name}_{key}"), colour))
        held_out[name] = chart(metric.label, Panel(lines, metric.unit, from_zero=metric.unit is not ACCURACY))
    drawn = [
        held_out.pop("loss"),
        *(chart(_heading(name), Panel([trained(name)], LOSS)) for name in others),
        *held_out.values(),
    ]
    for heading, names in charts_of_training().items():
        panels = [
            Panel([trained(name, METRICS[name].label.lower(), colour)], METRICS[name].unit)
            for name, colour in zip(names, cycle(("model", "interpolation")), strict=False)
        ]
        drawn.append(chart(heading, *panels))
    return [item for item in drawn if item is not None]
