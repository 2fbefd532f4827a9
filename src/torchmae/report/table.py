"""The table at the end of `torchmae pretrain`."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from torchmae.report.metrics import BASELINES, METRICS, finite
from torchmae.words import in_words


def final_table(figures: Mapping[str, Any]) -> str:
    """The figures of a run, as in summary.json, beside their baselines."""
    table = Table("held-out images" if figures["num_val"] else "figure", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("this model", *BASELINES.values()):
        table.add_column(name.removeprefix("the ").removesuffix(" network"), justify="right")
    for name, metric in METRICS.items():
        if metric.goal and figures.get(name) is not None:
            of = f" on masked {figures['target']}" if name == "loss" else ""
            values = (finite(figures, key) for key in (name, *(f"{name}_{beside}" for beside in BASELINES)))
            cells = ("" if value is None else metric.unit.cell(value) for value in values)
            table.add_row(f"{metric.heading}{of}", *cells)
    output = StringIO()
    console = Console(file=output, width=100, highlight=False)
    console.print(
        f"\n{figures['steps']:,} steps, {figures['images_seen']:,} images in {figures['seconds']:.0f} s of training "
        f"({figures['images_per_s']:,.0f} images/s)",
        markup=False,
    )
    if table.row_count:
        console.print(table)
    text = "\n".join(line.rstrip() for line in output.getvalue().splitlines())
    return in_words(text, figures.get("kind", "image"))
