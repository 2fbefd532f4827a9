"""`torchmae evaluate`: measures what a model learned, beside an untrained network and raw pixels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from torchmae.commands import print_json
from torchmae.config.evaluate import ComputeOptions, EvaluateOptions, RunOrBaseline
from torchmae.errors import ConfigError, Interrupted
from torchmae.evaluation.suite import Evaluation, evaluate, record_evaluation
from torchmae.report.metrics import AUROC, TRAINING, Figure, figures_as_text, measure_of
from torchmae.words import in_words

HEADINGS = {"model": "this model", "random": "untrained", "pixels": "raw pixels"}


def run(options: EvaluateOptions, compute: ComputeOptions, model: RunOrBaseline) -> int:
    """Runs the command; returns the exit status."""
    is_main = os.environ.get("RANK", "0") == "0"  # only rank 0 prints
    try:
        evaluation = evaluate(model.run, options, compute)
    except (ConfigError, Interrupted) as error:  # all ranks raise it
        if is_main:
            raise
        return error.exit_status
    if not is_main:
        return 0
    print(report(evaluation), flush=True)
    try:
        record = record_evaluation(model.run, evaluation)
        if record is not None:
            print(f"recorded with settings, top-5, classes and confusions: {record}")
    finally:  # print the figures even if the record cannot be written
        twins = evaluation.data.twins._asdict()
        figures = {"run": model.run, "method": options.method, "figures": evaluation.figures(), "twins": twins}
        print_json(model.json, figures)
    return 0


def report(evaluation: Evaluation) -> str:
    """The images of the evaluation, a table of figures, and notes, as text."""
    data = evaluation.data
    reconstructions = [*evaluation.results.get("reconstruction", {}).values()]
    if reconstructions:
        images = f"{reconstructions[0].details['images']:,} test images"
        table = reconstruction_table(reconstructions[0].details["rows"])
    else:
        images = f"{len(data.train):,} training and {len(data.test):,} test images of {len(data.classes)} classes"
        if "anomaly" in evaluation.results:
            labels = data.test.source.labels
            assert labels is not None
            anomalous = int(labels.sum())
            images = f"{len(data.train):,} normal images, {len(data.test):,} to test, {anomalous:,} of them anomalous"
        table = figure_table(evaluation.figures())
    output = StringIO()
    Console(file=output, width=120, highlight=False).print(table)
    lines = [line.rstrip() for line in output.getvalue().splitlines()]
    text = in_words("\n".join([images, *lines]), evaluation.kind)
    return "\n".join(["", text, *(f"note: {note}" for note in evaluation.notes)])


def figure_table(by_subject: Mapping[str, Mapping[str, float]]) -> Table:
    """A row for each figure, a column for each subject; the first heading gives the unit and the kind of spread."""
    texts = {subject: figures_as_text(figures) for subject, figures in by_subject.items()}
    names = dict.fromkeys(name for column in texts.values() for name in column)
    shown = [name for name in names if measure_of(name).unit != TRAINING]
    table = Table(heading(shown[0], texts), box=SIMPLE_HEAD, pad_edge=False)
    for subject in by_subject:
        table.add_column(HEADINGS.get(subject, subject), justify="right")
    for name in shown:
        table.add_row(measure_of(name).label, *(cell(column.get(name, Figure())) for column in texts.values()))
    return table


def heading(name: str, texts: Mapping[str, Mapping[str, Figure]]) -> str:
    """The unit of a figure and the kind of its spread: an interval or a deviation."""
    unit = measure_of(name).unit
    spread = next(column[name].spread for column in texts.values() if name in column)
    if unit == AUROC:
        return f"{unit.name} (0.5: chance)"
    if not spread:
        return unit.name
    return f"{unit.name} {'± deviation over draws' if spread.startswith('±') else '(95% interval)'}"


def cell(figure: Figure) -> str:
    """A figure and its spread: "44.0 (43.1 to 45.0)" or "44.0 ± 1.2"; empty without a figure."""
    if not figure.spread:
        return figure.value
    return f"{figure.value} {figure.spread if figure.spread.startswith('±') else f'({figure.spread})'}"


def reconstruction_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each mask; the model's figures beside those of interpolation."""
    metrics = {"psnr": "PSNR, dB", "ssim": "SSIM", "explained_variance": "explained variance"}
    table = Table("mask", "ratio", box=SIMPLE_HEAD, pad_edge=False)
    shown = [name for name in metrics if name in rows[0]]
    for name in shown:
        table.add_column(metrics[name], justify="right")
        table.add_column("interpolation", justify="right")
    for row in rows:
        values = (row[key] for name in shown for key in (name, f"{name}_interpolation"))
        table.add_row(row["strategy"], f"{row['ratio']:g}", *(f"{value:.3f}" for value in values))
    return table
