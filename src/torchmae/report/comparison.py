"""Several runs side by side on one HTML page: figures, curves, pictures, differing settings."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

from torchmae.errors import ConfigError
from torchmae.files import replace_file
from torchmae.report.charts import RUN_COLOURS, Chart, Line, Panel, chart, level, series_of
from torchmae.report.evaluations import figures_of_run
from torchmae.report.metrics import (
    ACCURACY,
    BASELINES,
    GOALS,
    METRICS,
    Figure,
    Row,
    charts_of_training,
    finite,
    metrics_of,
)
from torchmae.report.page import Embedded, Titled, embed, load_titled, open_picture, render_page
from torchmae.report.pictures import read_layout, split_columns, strip_grid
from torchmae.report.run import Run, duration, load_run, short_count, yaml_text
from torchmae.report.verdict import Verdict, judge, training_hints

MAX_RUNS = 16

_IDLE = ("out",)  # differs always
_ENVIRONMENT = ("torchmae", "torch", "processor", "device", "threads", "precision")


class Column(NamedTuple):
    """A run on the page: `letter` is its short name, `colour` a number in the style sheet."""

    letter: str
    order: int
    colour: int
    name: str
    verdict: Verdict
    hints: tuple[str, ...]
    run: Run


class SideBySide(NamedTuple):
    """All runs' reconstructions of the same images; `notes` are (letters of runs, note on their reconstructions)."""

    picture: Embedded
    notes: tuple[tuple[str, str], ...]


def write_comparison(runs: Sequence[Path], page: Path) -> Path:
    """Writes one page of several runs, finished or not, and returns its path.

    Raises:
        ConfigError: fewer than two runs, more than 16, or the same run twice.
        CheckpointError: a folder that is no run or cannot be read, or a page that cannot be written.
    """
    if not 2 <= len(runs) <= MAX_RUNS:
        raise ConfigError(f"{len(runs)} runs cannot be compared on one page", f"give 2 to {MAX_RUNS}")
    resolved = [run.resolve() for run in runs]
    for run, path in zip(runs, resolved, strict=True):
        if resolved.count(path) > 1:
            raise ConfigError(f"{run} is given twice", "name each run once")
    replace_file(page, render_comparison([load_run(run) for run in runs]).encode("utf-8"))
    return page


def render_comparison(runs: Sequence[Run]) -> str:
    """The page of several runs, as HTML."""
    columns = _columns(runs)
    configs = [run.settings for run in runs]
    differing = {goal: _differing(columns, goal, configs) for goal in GOALS}
    evaluations, evaluations_differ = evaluation_tables(columns)
    reconstructions, own_reconstructions = _reconstructions(columns)
    rows = [
        row
        for goal, differences in differing.items()
        for name in metrics_of(goal)
        for row in _metric_rows(columns, name, not differences + _differ(METRICS[name].settings, configs))
    ]
    kinds = {run.kind for run in runs}
    return render_page(
        "comparison.html",
        kind=kinds.pop() if len(kinds) == 1 else "image",
        title=f"{len(runs)} runs compared",
        columns=columns,
        rows=rows,
        any_best=any(cell.best for row in rows for cell in row.cells),
        task_differences=differing["reconstruction"],
        knn_images=columns[0].run.figures.get("knn_images"),
        accuracy_noise=_accuracy_noise(columns),
        costs=list(_cost_rows(columns)),
        evaluations=evaluations.items(),
        evaluations_differ=evaluations_differ,
        charts=[item for item in _charts(columns) if item is not None],
        reconstructions=reconstructions,
        own_reconstructions=own_reconstructions,
        learned=_learned(columns),
        differences=setting_rows(configs),
        environments=setting_rows([{key: run.environment.get(key) for key in _ENVIRONMENT} for run in runs]),
        folders=" ".join(shlex.quote(run.path.as_posix()) for run in runs),
        version=next((run.environment["torchmae"] for run in runs if run.environment.get("torchmae")), None),
    )


def _metric_rows(columns: Sequence[Column], name: str, comparable: bool) -> Iterator[Row]:
    """A row for a figure, with the best run marked if the runs are `comparable`, and a row for each baseline."""
    metric = METRICS[name]
    noise = _accuracy_noise(columns) if metric.unit is ACCURACY else 0.0
    values = [column.run.figures.get(name) for column in columns]
    yield from _row(metric.label, values, metric.unit.text, metric.best if comparable else None, noise)
    for key in metric.baselines:
        values = [column.run.figures.get(f"{name}_{key}") for column in columns]
        yield from _row(f"of {BASELINES[key]}", values, metric.unit.text, kind="beside")


def _cost_rows(columns: Sequence[Column]) -> Iterator[Row]:
    """Parameters, steps, images and time of the runs."""
    for label, show, *keys in (
        ("Encoder parameters", short_count, "params_encoder"),
        ("Decoder parameters", short_count, "params_decoder"),
        ("Steps", "{:,.0f}".format, "steps", "step"),
        ("Images seen", short_count, "images_seen"),
        ("Training time", duration, "seconds"),
        ("Images per second", "{:,.0f}".format, "images_per_s"),
    ):
        yield from _row(label, [column.run.latest(*keys) for column in columns], show)


def evaluation_tables(columns: Sequence[Column]) -> tuple[dict[str, list[Row]], bool]:
    """Rows of a table for each unit, with the figures of `torchmae evaluate`, and whether any row has a star.

    A star marks figures whose images or options differ between runs.
    """
    of_runs = [figures_of_run(column.run.evaluations) for column in columns]
    by_unit: dict[str, list[Row]] = {}
    any_differs = False
    for unit, label in dict.fromkeys(key for figures in of_runs for key in figures):
        found = [figures.get((unit, label)) for figures in of_runs]
        differs = len({item.basis for item in found if item is not None}) > 1
        any_differs |= differs
        cells = tuple(Figure() if item is None else item.figure for item in found)
        by_unit.setdefault(unit, []).append(Row(f"{label} *" if differs else label, cells))
    return by_unit, any_differs


def setting_rows(settings: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The settings in which runs differ, as YAML; `settings` are each run's values by dotted name."""
    names = dict.fromkeys(name for values in settings for name in values if name not in _IDLE)
    return [
        Row(name, tuple(Figure(yaml_text(values[name]) if name in values else "") for values in settings))
        for name in _differ(names, settings)
    ]


def _columns(runs: Sequence[Run]) -> list[Column]:
    # The folder's own name, also where it is given as "." or with a slash behind it.
    names = [run.path.resolve().name for run in runs]
    return [
        Column(
            letter=ascii_uppercase[order],
            order=order,
            colour=order % len(RUN_COLOURS),
            name=name if names.count(name) == 1 else run.path.as_posix(),
            verdict=judge(run.figures, run.unit),
            hints=tuple(training_hints(run.records)),
            run=run,
        )
        for order, (run, name) in enumerate(zip(runs, names, strict=True))
    ]


def _row(
    label: str,
    values: Sequence[float | None],
    show: Callable[[float], str],
    best_of: Callable[[Sequence[float]], float] | None = None,
    noise: float = 0.0,
    kind: str = "",
) -> Iterator[Row]:
    """A row if any value is known; marks values that read like the best or lie within `noise` of it, unless all do."""
    known = [value for value in values if value is not None]
    if not known:
        return
    best = None if best_of is None else best_of(known)
    marked = [
        best is not None and value is not None and (show(value) == show(best) or abs(value - best) < noise)
        for value in values
    ]
    texts = ("" if value is None else show(value).replace("-", "\N{MINUS SIGN}") for value in values)
    some = sum(marked) < len(known)
    yield Row(label, tuple(Figure(text, best=some and one) for text, one in zip(texts, marked, strict=True)), kind)


def _accuracy_noise(columns: Sequence[Column]) -> float:
    """An upper bound of two standard errors of a difference of accuracies, in points; 0 where it is unknown."""
    images = columns[0].run.figures.get("knn_images")
    return 2 * 100 * math.sqrt(2 * 0.25 / images) if images else 0.0


def _differ(names: Iterable[str], mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names whose values differ between the mappings."""
    return [name for name in names if len({repr(values.get(name)) for values in mappings}) > 1]


def _differing(columns: Sequence[Column], goal: str, configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The differing settings that figures of a goal depend on; for reconstruction also those of the preset."""
    found = _differ(GOALS[goal].settings, configs)
    if goal == "reconstruction":
        summaries = [column.run.summary for column in columns if column.run.summary]
        found += [key.replace("_", " ") for key in _differ(("target", "patch_size", "input_size"), summaries)]
    return found


def _charts(columns: Sequence[Column]) -> Iterator[Chart | None]:
    """Curves over the images seen, or over steps if a run's batch size is unknown."""
    sizes = [finite(column.run.config, "batch_size") for column in columns]
    along = "steps" if None in sizes else "images seen"
    training = ["loss", *(names[0] for names in charts_of_training().values())]
    for kind, name in (*(("val", name) for name in METRICS), *(("train", name) for name in training)):
        metric = METRICS[name]
        lines = []
        for column, size in zip(columns, sizes, strict=True):
            steps, values = series_of(column.run.val if kind == "val" else column.run.train, name)
            x = steps * (size if size is not None and along != "steps" else 1)
            dashed = column.order >= len(RUN_COLOURS)
            lines.append(Line(column.name, f"run-{column.colour}", x, values, dashed=dashed, letter=column.letter))
        for key in metric.baselines[:1] if kind == "val" else ():  # drawn if it is the same for all runs
            beside = [column.run.figures.get(f"{name}_{key}") for column in columns]
            if len({None if value is None else f"{value:.4g}" for value in beside}) == 1:
                lines.append(level(BASELINES[key], beside[0], "mean"))
        heading = metric.label
        if name == "loss":
            heading = "Training loss" if kind == "train" else "Loss on held-out images"
        yield chart(heading, Panel(lines, metric.unit, from_zero=metric.best is None), along=along)


def _reconstructions(columns: Sequence[Column]) -> tuple[SideBySide | None, list[Titled]]:
    """All runs' reconstructions of the same images; if the runs' images or masks differ, each run's own picture."""
    found = []
    for column in columns:
        grid = open_picture(column.run.pictures[-1][1]) if column.run.pictures else None
        if grid is not None:
            layout = read_layout(grid)
            found.append((column, grid, layout.note if layout else ""))
    picture = strip_grid([grid for _, grid, _ in found]) if len(found) == len(columns) else None
    if picture is None:
        title = "Masked, reconstructed, original"
        return None, [Titled(embed(split_columns(grid)[0]), title, note, _of(column)) for column, grid, note in found]
    letters: dict[str, list[str]] = {}
    for column, _, note in found:
        letters.setdefault(note, []).append(column.letter)
    return SideBySide(embed(picture), tuple((", ".join(of), note) for note, of in letters.items() if note)), []


def _of(column: Column) -> str:
    return f"run {column.letter}, {column.name}"


def _learned(columns: Sequence[Column]) -> list[tuple[str, str, list[Titled]]]:
    """(title, description, pictures of the runs) for each kind of feature picture."""
    found: dict[str, list[Titled]] = {}
    for column in columns:
        for path in column.run.feature_pictures:
            picture = load_titled(path, of=_of(column))
            if picture is not None:
                found.setdefault(path.stem, []).append(picture)
    return [(found[stem][0].title, found[stem][0].description, found[stem]) for stem in sorted(found)]
