"""A run folder becomes one HTML page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from torchmae.config import PretrainConfig
from torchmae.files import replace_file
from torchmae.report import charts
from torchmae.report.evaluations import latest_evaluations
from torchmae.report.facts import describe, facts, hidden_unit, is_finished, setting, state, title, yaml_text
from torchmae.report.hints import training_hints
from torchmae.report.page import Embedded, embed, load_titled, open_picture, render_page
from torchmae.report.pictures import HEADERS, progress_grid, read_layout, split_columns
from torchmae.report.run import Record, Run, load_run
from torchmae.report.verdict import Figures, final_figures, finite, judge, number, percent, trend

# Reconstructions shown side by side, from the first to the last.
_MAX_MOMENTS = 4
_MAX_BAD_FILES = 20

_ENVIRONMENT_LABELS = {
    "torchmae": "torchmae",
    "torch": "PyTorch",
    "torchvision": "torchvision",
    "jpeg_decoder": "JPEG decoder",
    "python": "Python",
    "platform": "Platform",
    "processor": "Processor",
    "device": "Device",
    "threads": "Threads",
    "precision": "Precision",
    "started": "Started",
    "command": "Command",
    "data": "Data",
}


@dataclass(frozen=True)
class Reconstructions:
    """What the model made of held-out images.

    Attributes:
        step: the optimiser step of the last picture.
        columns: the last picture, cut in columns: side by side, or on a phone one below the other.
        headers: what stands above each third of a column; empty where the picture carries its own.
        pixelated: whether pixels are to be seen as squares.
        note: how the reconstruction came about.
        progress: masked, then the reconstruction at each of `progress_steps`, then the original; None if there is
            only one picture.
        progress_steps: the steps in it.
    """

    step: int
    columns: tuple[Embedded, ...]
    headers: tuple[str, ...]
    pixelated: bool
    note: str
    progress: Embedded | None
    progress_steps: tuple[int, ...]


@dataclass(frozen=True)
class Share:
    """A figure that is a share of something.

    Attributes:
        text: the figure; empty where there is none.
        bar: the same as length, 0 to 100.
    """

    text: str
    bar: float


@dataclass(frozen=True)
class LossScore:
    """How well something predicts what is hidden.

    Attributes:
        label: what predicts.
        loss: the loss as text.
        explained: explained variance.
        ours: whether it is the trained model.
    """

    label: str
    loss: str
    explained: Share
    ours: bool


@dataclass(frozen=True)
class ClassScore:
    """How well features tell classes apart.

    Attributes:
        label: whose features.
        accuracies: of the classifiers that were run, in one order.
        ours: whether they are the trained model's.
    """

    label: str
    accuracies: tuple[Share, ...]
    ours: bool


@dataclass(frozen=True)
class Setting:
    """A line of the configuration as YAML, and whether it differs from torchmae's default."""

    name: str
    value: str
    changed: bool


def write_report(run: Path, page: Path | None = None) -> Path:
    """Writes a page from what the run folder holds, finished or not; the same folder gives the same bytes.

    Args:
        run: the run folder; its name appears in the commands on the page as it is given here.
        page: the file to write; None: RUN/report.html.

    Returns:
        The path of the page.

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
    classifiers, class_rows = class_scores(figures)
    return render_page(
        "run.html",
        title=title(run),
        state=state(run),
        sentence=describe(run),
        facts=facts(run),
        verdict=judge(figures, unit),
        trend=trend(run.val),
        hints=training_hints(run.records),  # the verdict has weighed the loss
        scores=loss_scores(figures, unit),
        classifiers=classifiers,
        class_scores=class_rows,
        knn_images=figures.knn_images,
        linear_train=setting(run, "eval", "linear_train"),
        measured_at=figures.step,
        normalised=run.summary.get("target") == "normalised patches",
        unit=unit,
        pictures=load_reconstructions(run),
        evaluations=evaluations,
        evaluations_left=evaluations_left,
        learned=[picture for path in run.feature_pictures if (picture := load_titled(path)) is not None],
        # The drawings are made here, of numbers alone, and are the one thing that is HTML already.
        charts=[(chart, Markup(chart.svg)) for chart in _charts(run, figures)],
        settings=settings(run.config),
        environment=environment_rows(run.environment),
        bad_files=run.bad_files[:_MAX_BAD_FILES],
        bad_files_left=max(0, len(run.bad_files) - _MAX_BAD_FILES),
        finished=is_finished(run),
        folder=shlex.quote(folder),
        folder_literal=repr(folder),
        again=shlex.quote(f"{folder}-again"),
        version=run.environment.get("torchmae"),
    )


def loss_scores(figures: Figures, unit: str) -> list[LossScore]:
    """The model's loss and explained variance beside the trivial predictors', where they were measured."""
    rows = (
        ("This model", figures.loss, figures.explained_variance),
        (f"Interpolation from visible {unit}", figures.loss_interpolation, figures.explained_variance_interpolation),
        (f"Mean of visible {unit}", figures.loss_mean_patch, figures.explained_variance_mean_patch),
    )
    return [
        LossScore(label, number(loss), _share(variance), ours=label == "This model")
        for label, loss, variance in rows
        if loss is not None
    ]


def class_scores(figures: Figures) -> tuple[list[str], list[ClassScore]]:
    """The classifiers that were run on the features, and their accuracies beside those of the baselines.

    Both are empty where there are no labels.
    """
    by_classifier = {
        "kNN": (figures.knn, figures.knn_pixels, figures.knn_untrained),
        "Linear probe": (figures.linear, figures.linear_pixels, figures.linear_untrained),
    }
    measured = {name: values for name, values in by_classifier.items() if values[0] is not None}
    labels = ("This model", "Raw pixels", "The same network, untrained")
    rows = [
        ClassScore(
            label,
            tuple(_share(None if value is None else value / 100) for value in values),
            ours=label == labels[0],
        )
        for label, values in zip(labels, zip(*measured.values(), strict=True), strict=False)
        if any(value is not None for value in values)
    ]
    return list(measured), rows


def load_reconstructions(run: Run) -> Reconstructions | None:
    """The last picture of a run, and how it came about; None if there is no picture that can be read."""
    opened = [(step, open_picture(path)) for step, path in _spread(run.pictures, _MAX_MOMENTS)]
    readable = [(step, picture) for step, picture in opened if picture is not None]
    if not readable:
        return None
    step, last = readable[-1]
    layout = read_layout(last)
    progress = progress_grid([picture for _, picture in readable]) if len(readable) > 1 else None
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
    top = [_as_setting(name, value, defaults) for name, value in config.items() if not isinstance(value, dict)]
    sections = [("", top)] if top else []
    for section, values in config.items():
        if isinstance(values, dict):
            of_section = defaults.get(section, {})
            sections.append((str(section), [_as_setting(name, value, of_section) for name, value in values.items()]))
    return sections


def environment_rows(environment: Record) -> list[tuple[str, str]]:
    """(label, value) of what the run ran on, the known ones first and in a fixed order."""
    known = [key for key in _ENVIRONMENT_LABELS if environment.get(key) is not None]
    others = [key for key in environment if key not in _ENVIRONMENT_LABELS]
    return [(_ENVIRONMENT_LABELS.get(key, str(key)), str(environment[key])) for key in (*known, *others)]


def _spread(items: Sequence[tuple[int, Path]], count: int) -> list[tuple[int, Path]]:
    """At most `count` of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _share(value: float | None) -> Share:
    """A share, at most 1, as text and as a bar that is empty below zero."""
    text = "" if value is None else percent(value).replace("-", "\N{MINUS SIGN}")
    return Share(text, round(100 * min(max(value or 0.0, 0.0), 1.0), 1))


def _charts(run: Run, figures: Figures) -> list[charts.Chart]:
    others = sorted({name[5:] for record in run.train for name in record if name.startswith("loss_")})
    # Runs of older versions logged the weighted sum of all targets' losses, which no loss on held-out images is like.
    model = run.config.get("model")
    summed = isinstance(model, dict) and bool(model.get("hog_weight")) and not others
    drawn = (
        charts.loss_chart([] if summed else run.train, run.val),
        *(charts.loss_chart(run.train, [], name) for name in others),
        charts.variance_chart(run.val),
        charts.accuracy_chart(run.val, "knn", figures.knn_untrained, figures.knn_pixels),
        charts.accuracy_chart(run.val, "linear", figures.linear_untrained, figures.linear_pixels),
        charts.rank_chart(run.val, next((finite(item, "effective_rank_untrained") for item in run.baseline), None)),
        charts.learning_rate_chart(run.train),
        charts.step_size_chart(run.train),
        charts.throughput_chart(run.train),
    )
    return [chart for chart in drawn if chart is not None]


def _as_setting(name: object, value: object, defaults: Mapping[str, Any]) -> Setting:
    # A default that is a tuple comes back from YAML as a list.
    default = defaults.get(str(name), ...)
    same = value == (list(default) if isinstance(default, tuple) else default)
    return Setting(str(name), yaml_text(value), changed=not same)
