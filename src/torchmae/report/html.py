"""A run folder becomes one HTML page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from torchmae.config import PretrainConfig
from torchmae.files import replace_file
from torchmae.report.charts import Chart, Line, Panel, chart, level, series_of
from torchmae.report.evaluations import latest_evaluations
from torchmae.report.metrics import ACCURACY, BASELINES, CLASSIFIERS, LOSS, METRICS, RECONSTRUCTION, Unit, final_figures
from torchmae.report.page import Embedded, embed, load_titled, open_picture, render_page
from torchmae.report.pictures import HEADERS, read_layout, split_columns, strip_grid
from torchmae.report.run import (
    Record,
    Run,
    describe,
    facts,
    hidden_unit,
    is_finished,
    load_run,
    setting,
    state,
    title,
    yaml_text,
)
from torchmae.report.verdict import judge, training_hints, trend

# Reconstructions shown side by side, from the first to the last.
_MAX_MOMENTS = 4
_MAX_BAD_FILES = 20
_COLOURS = {"interpolation": "interpolation", "pixels": "interpolation", "mean_patch": "mean", "untrained": "mean"}

_ENVIRONMENT_LABELS = {"torch": "PyTorch", "torchmae": "torchmae", "torchvision": "torchvision"}


@dataclass(frozen=True)
class Reconstructions:
    """What the model made of held-out images.

    Attributes:
        step: the optimiser step of the last picture.
        columns: the last picture, cut in columns: side by side, or on a phone one below the other.
        headers: what stands above each third of a column; empty where the picture carries its own.
        pixelated: whether pixels are to be seen as squares.
        note: how the reconstruction came about.
        progress: masked, the reconstruction at each of `progress_steps`, original; None of only one picture.
    """

    step: int
    columns: tuple[Embedded, ...]
    headers: tuple[str, ...]
    pixelated: bool
    note: str
    progress: Embedded | None
    progress_steps: tuple[int, ...]


@dataclass(frozen=True)
class ScoreTable:
    """Figures of the model beside those of what takes no learning.

    A column is (figure, whether it has bars); a row (label, (text, length of the bar in percent) for each column).
    """

    caption: str
    head: str
    columns: list[tuple[str, bool]]
    rows: list[tuple[str, list[tuple[str, float | None]]]]


@dataclass(frozen=True)
class Setting:
    """A line of the configuration as YAML, and whether it differs from torchmae's default."""

    name: str
    value: str
    changed: bool


def write_report(run: Path, page: Path | None = None) -> Path:
    """Writes a page, RUN/report.html or another, from what the run folder holds; the same folder gives the same bytes.

    The folder's name appears in the commands on the page as it is given here.

    Raises:
        CheckpointError: the folder is no run, cannot be read, or cannot be written to.
    """
    page = run / "report.html" if page is None else page
    replace_file(page, render(load_run(run)).encode("utf-8"))
    return page


def render(run: Run) -> str:
    """The page of a run, as HTML."""
    unit = hidden_unit(run)
    figures = final_figures(run.summary, run.val, run.baseline, setting(run, "eval", "knn_val"))
    folder = run.path.as_posix()
    evaluations, evaluations_left = latest_evaluations(run.evaluations)
    return render_page(
        "run.html",
        title=title(run),
        state=state(run),
        sentence=describe(run),
        facts=facts(run),
        verdict=judge(figures, unit),
        trend=trend(run.val),
        hints=training_hints(run.records),  # the verdict has weighed the loss
        scores=score_tables(figures, unit) if "loss" in figures else [],
        figures=figures,
        linear_train=setting(run, "eval", "linear_train"),
        normalised=run.summary.get("target") == "normalised patches",
        unit=unit,
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
        bad_files=run.bad_files[:_MAX_BAD_FILES],
        bad_files_left=max(0, len(run.bad_files) - _MAX_BAD_FILES),
        finished=is_finished(run),
        folder=shlex.quote(folder),
        folder_literal=repr(folder),
        again=shlex.quote(f"{folder}-again"),
        version=run.environment.get("torchmae"),
    )


def score_tables(figures: Mapping[str, float], unit: str) -> list[ScoreTable]:
    """Reconstruction and, where there are labels, classification, each beside its baselines."""
    trivial = {"interpolation": f"Interpolation from visible {unit}", "mean_patch": f"Mean of visible {unit}"}
    unlearned = {"pixels": "Raw pixels", "untrained": "The same network, untrained"}
    tables = []
    for caption, head, names, baselines in (
        ("Filling in what is hidden", "Predictor", RECONSTRUCTION, trivial),
        ("Telling classes apart", "Features of", CLASSIFIERS, unlearned),
    ):
        shown = {name: METRICS[name] for name in names if name in figures}
        rows = [
            (label, [_cell(metric.unit, figures.get(f"{name}{ending}")) for name, metric in shown.items()])
            for ending, label in {"": "This model", **{f"_{key}": label for key, label in baselines.items()}}.items()
            if any(f"{name}{ending}" in figures for name in shown)
        ]
        if rows:
            heads = [(metric.label.removesuffix(" accuracy"), metric.unit.is_share) for metric in shown.values()]
            tables.append(ScoreTable(caption, head, heads, rows))
    return tables


def load_reconstructions(run: Run) -> Reconstructions | None:
    """The last picture of a run, and how it came about; None if there is no picture that can be read."""
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
    """The configuration as (section, lines of YAML); values at the top level have the empty section."""
    defaults = asdict(PretrainConfig())
    sections: dict[str, list[Setting]] = {"": []}
    for section, values in config.items():
        nested = isinstance(values, dict)
        known = defaults.get(section, {}) if nested else defaults
        for name, value in values.items() if nested else ((section, values),):
            default = known.get(name, ...)
            # A default that is a tuple comes back from YAML as a list.
            same = value == (list(default) if isinstance(default, tuple) else default)
            sections.setdefault(section if nested else "", []).append(Setting(str(name), yaml_text(value), not same))
    return [(str(section), lines) for section, lines in sections.items() if lines]


def _cell(unit: Unit, value: float | None) -> tuple[str, float | None]:
    """A figure as text, and where it is a share, the length of its bar in percent."""
    text = "" if value is None else unit.text(value).replace("-", "\N{MINUS SIGN}")
    return text, round(min(max((value or 0.0) * unit.scale, 0.0), 100.0), 1) if unit.is_share else None


def _charts(run: Run, figures: Mapping[str, float]) -> list[Chart]:
    def trained(key: str, label: str = "training", colour: str = "train") -> Line:
        return Line(label, colour, *series_of(run.train, key))

    def measured(name: str, *others: Line, label: str = "this model") -> Chart | None:
        metric = METRICS[name]
        lines = [*others, Line(label, "model", *series_of(run.val, name))]
        lines += [level(BASELINES[key], figures.get(f"{name}_{key}"), _COLOURS[key]) for key in metric.baselines]
        return chart(metric.label, Panel(lines, metric.unit, from_zero=metric.unit is not ACCURACY))

    def of_training(title: str, *names: str) -> Chart | None:
        panels = zip(names, ("model", "interpolation"), strict=False)
        return chart(
            title,
            *(
                Panel([trained(name, METRICS[name].label.lower(), colour)], METRICS[name].unit)
                for name, colour in panels
            ),
        )

    others = sorted({name for record in run.train for name in record if name.startswith("loss_")})
    # Runs of older versions logged the weighted sum of all targets' losses, which no loss on held-out images is like.
    summed = bool(setting(run, "model", "hog_weight")) and not others
    drawn = (
        measured("loss", *([] if summed else [trained("loss")]), label="held-out images"),
        *(chart(f"Training loss of the target {name[5:]}", Panel([trained(name)], LOSS)) for name in others),
        *(measured(name) for name in ("explained_variance", *CLASSIFIERS, "effective_rank")),
        of_training("Learning rate", "lr"),
        of_training("Size of the steps", "update_to_weight", "grad_norm"),
        of_training("Throughput", "images_per_s", "data_wait"),
    )
    return [item for item in drawn if item is not None]
