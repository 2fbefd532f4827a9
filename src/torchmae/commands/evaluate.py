"""`torchmae evaluate`: what a model learned, in figures beside those of features that take no learning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from torchmae import settings
from torchmae.commands.parsing import parse
from torchmae.evaluation.options import ComputeOptions, EvaluateOptions

if TYPE_CHECKING:
    from torchmae.evaluation.suite import Evaluation

DESCRIPTION = (
    "Measures a trained model: nearest neighbours, linear and attentive probes (--method all, the default). What has "
    "to be asked for by --method: reconstruction, finetune (a classifier trained end to end, for minutes to hours), "
    "and anomaly (with --normal DIR --test DIR)."
)
NO_ACCURACY = ("_top5", "_low", "_high", "_std", "_loss", "_images", "_seconds")
EPILOG = (
    "--json prints the figures as one JSON object on the last line; --init is short for --finetune.init, and --resume "
    "alone for --resume true."
)
HEADINGS = {"model": "this model", "random": "untrained", "pixels": "raw pixels"}


def main(args: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = settings.Parser(
        prog="torchmae evaluate",
        usage="torchmae evaluate RUN [OPTIONS]",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=str, help="run folder or exported model; or random or pixels, with --preset")
    args = spell_out(settings.normalise(args))
    as_json = settings.take_flag(args, "json")
    values, options, compute = parse(parser, args, EvaluateOptions, ComputeOptions)

    from torchmae.evaluation.suite import evaluate, record_evaluation

    evaluation = evaluate(values.run, options, compute)
    print(report(evaluation), flush=True)
    if as_json:
        print(json.dumps({"run": values.run, "method": options.method, "figures": evaluation.figures()}), flush=True)
    record_evaluation(values.run, evaluation)
    return 0


def spell_out(args: Sequence[str]) -> list[str]:
    """Words with --finetune.init for --init, and --resume=true for --resume without a value."""
    words = []
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if arg == "--resume" and args[i + 1 : i + 2] not in (["true"], ["false"]):
            words.append("--resume=true")
        else:
            words.append(f"--finetune.init{equals}{value}" if name == "--init" else arg)
    return words


def report(evaluation: Evaluation) -> str:
    """The figures as a table, what they were measured on, and the notes."""
    data = evaluation.data
    by_subject = evaluation.figures()
    reconstructions = [*evaluation.results.get("reconstruction", {}).values()]
    if reconstructions:
        images = f"{reconstructions[0].details['images']:,} test images"
        table = reconstruction_table(reconstructions[0].details["rows"])
    elif "anomaly" in evaluation.results:
        labels = data.test.source.labels
        assert labels is not None
        anomalous = int(labels.sum())
        images = f"{len(data.train):,} normal images, {len(data.test):,} to test, {anomalous:,} of them anomalous"
        table = anomaly_table(by_subject["model"])
    else:
        images = f"{len(data.train):,} training and {len(data.test):,} test images of {len(data.classes)} classes"
        table = accuracy_table(by_subject)
    output = StringIO()
    Console(file=output, width=120, highlight=False).print(table)
    lines = [line.rstrip() for line in output.getvalue().splitlines()]
    return "\n".join(["", images, *lines, *(f"note: {note}" for note in evaluation.notes)])


def accuracy_table(by_subject: Mapping[str, Mapping[str, float]]) -> Table:
    """A row for each figure, a column for each subject."""
    table = Table("accuracy, %", box=SIMPLE_HEAD, pad_edge=False)
    for name in by_subject:
        table.add_column(HEADINGS.get(name, name), justify="right")
    for name in dict.fromkeys(name for figures in by_subject.values() for name in figures):
        if not name.endswith(NO_ACCURACY):
            table.add_row(name, *(cell(figures, name) for figures in by_subject.values()))
    return table


def anomaly_table(figures: Mapping[str, float]) -> Table:
    """A row for each score."""
    table = Table("anomaly score", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("AUROC (0.5: chance)", justify="right")
    for name in figures:
        table.add_row(name.removeprefix("anomaly_"), cell(figures, name))
    return table


def reconstruction_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each mask, the model's figures beside interpolation's."""
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


def cell(figures: Mapping[str, float], name: str) -> str:
    """A figure with what says how sure it is: "44.0 [43.1, 45.0]" or "44.0 ± 1.2"; empty where there is none."""
    if name not in figures:
        return ""
    if f"{name}_low" in figures:
        text = f"{figures[name]:.1f} [{figures[f'{name}_low']:.1f}, {figures[f'{name}_high']:.1f}]"
    elif f"{name}_std" in figures:
        text = f"{figures[name]:.1f} ± {figures[f'{name}_std']:.1f}"
    else:
        text = f"{figures[name]:.3f}"
    return text
