"""The short table a command ends with."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def final_table(figures: Mapping[str, Any]) -> str:
    """The figures of a run beside predictions and features that take no learning.

    Args:
        figures: as in summary.json.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("held-out images" if figures["num_val"] else "figure")
    for name in ("this model", "interpolation", "mean patch", "untrained", "raw pixels"):
        table.add_column(name, justify="right")
    if figures["loss"] is not None:
        table.add_row(
            f"loss on hidden {figures['target']}",
            *(_number(figures[name], ".4f") for name in ("loss", "loss_interpolation", "loss_mean_patch")),
        )
        table.add_row(
            "explained variance",
            *(_number(figures[name], ".3f") for name in ("explained_variance", "explained_variance_interpolation")),
        )
    for key, label in (("knn", "kNN accuracy, %"), ("linear", "linear probe accuracy, %")):
        if figures[key] is not None:
            own, *others = (_number(figures[name], ".1f") for name in (key, f"{key}_untrained", f"{key}_pixels"))
            table.add_row(label, own, "", "", *others)
    output = StringIO()
    console = Console(file=output, width=100, highlight=False)
    console.print(
        f"\n{figures['steps']:,} steps, {figures['images_seen']:,} images in {figures['seconds']:.0f} s of training "
        f"({figures['images_per_s']:,.0f} images/s)",
        markup=False,
    )
    if table.row_count:
        console.print(table)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
