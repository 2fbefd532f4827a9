"""What a benchmark found, as a record, a table, a file and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO, StringIO
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from torchmae.files import replace_file

FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "share_of_peak": ("of peak", lambda value: f"{value:.1%}"),
    "peak_memory": ("memory, GiB", lambda value: f"{value / 2**30:.2f}"),
    "first_step_s": ("first step, s", lambda value: f"{value:.1f}"),
    "per_worker": ("a worker", lambda value: f"{value:,.0f}"),
}
"""The figures of a result that the table shows beside images a second: name in the record, heading and form."""


@dataclass(frozen=True)
class Result:
    """One contender's figures.

    Attributes:
        name: of the contender.
        images_per_s: one figure a round.
        shares: of its time, by part; adding up to 1.
        figures: others, by name; None where one could not be measured.
    """

    name: str
    images_per_s: tuple[float, ...]
    shares: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """The median of all rounds, in images a second."""
        return median(self.images_per_s)


@dataclass(frozen=True)
class Report:
    """A benchmark's figures.

    Attributes:
        title: what was measured.
        results: ours first; the others are compared with it.
        notes: sentences that belong to the figures.
        environment: hardware, versions, command and time.
        settings: all of the run's.
    """

    title: str
    results: Sequence[Result]
    notes: Sequence[str]
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]

    def ratios(self) -> dict[str, float]:
        """How many times as fast as each other contender the first one is: the ratio of the medians."""
        first, *others = self.results
        return {other.name: first.median / other.median for other in others}

    def text(self) -> str:
        """The figures as a table; its ratios say how many times as fast as that contender the first one is."""
        stream = StringIO()
        Console(file=stream, width=200).print(_table(self))
        environment = self.environment
        machine = f"{environment['processor']}, threads {environment['threads']}, torch {environment['torch']}"
        lines = [line.rstrip() for line in stream.getvalue().strip("\n").splitlines()]
        first = self.results[0]
        ratio = f"Ratio: {first.name} over the row's, of the medians of {len(first.images_per_s)} rounds."
        return "\n".join([self.title, machine, *lines, *([ratio] if self.ratios() else []), *self.notes])

    def record(self) -> dict[str, Any]:
        """All figures, for a JSON file."""
        results = [{"name": result.name, "median": result.median, **asdict(result)} for result in self.results]
        return {**asdict(self), "results": results, "ratios": self.ratios()}

    def write_json(self, path: Path) -> None:
        """Writes `record`, whole or not at all."""
        replace_file(path, _json(self.record()))

    def add_to_json(self, path: Path, name: str) -> None:
        """Puts `record` into a JSON file of several, in place of an earlier one of that name."""
        records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        replace_file(path, _json({**records, name: self.record()}))

    def write_plot(self, path: Path) -> None:
        """Writes a PNG picture: images a second (bars from the slowest to the fastest round), and shares of time."""
        replace_file(path, _picture(self))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _table(report: Report) -> Table:
    table = Table("", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("images/s", "low - high"):
        table.add_column(heading, justify="right")
    ratios = report.ratios()
    if ratios:
        table.add_column("ratio", justify="right")
    figures = [name for name in _names(result.figures for result in report.results) if name in FIGURES]
    shares = _names(result.shares for result in report.results)
    for heading in (*(FIGURES[name][0] for name in figures), *shares):
        table.add_column(heading, justify="right")
    for result in report.results:
        rounds = result.images_per_s
        table.add_row(
            result.name,
            _rate(result.median),
            f"{_rate(min(rounds))} - {_rate(max(rounds))}",
            *([f"{ratios[result.name]:.2f}" if result.name in ratios else ""] if ratios else []),
            *(_figure(name, result.figures.get(name)) for name in figures),
            *(f"{result.shares[name]:.0%}" if name in result.shares else "" for name in shares),
        )
    return table


def _names(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for group in groups for name in group))


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _figure(name: str, value: float | None) -> str:
    return "-" if value is None else FIGURES[name][1](value)


def _picture(report: Report) -> bytes:
    from matplotlib.figure import Figure

    results = list(reversed(report.results))  # bars are drawn from the bottom up
    parts = _names(result.shares for result in report.results)
    figure = Figure(figsize=(8, 1.6 + 0.5 * len(results)), layout="constrained")
    figure.suptitle(report.title, fontsize=10)
    speed, *rest = figure.subplots(1, 2 if parts else 1, squeeze=False)[0]
    for i, result in enumerate(results):
        slow, fast = min(result.images_per_s), max(result.images_per_s)
        speed.barh(i, result.median, xerr=[[result.median - slow], [fast - result.median]], color="#4477aa", capsize=3)
        speed.text(0, i, f" {_rate(result.median)}", va="center", color="white")
    names = [result.name for result in results]
    speed.set(yticks=range(len(names)), yticklabels=names, xlabel="images/s (line: slowest to fastest round)")
    for axes in rest:
        left = [0.0] * len(results)
        for part in parts:
            widths = [100 * result.shares.get(part, 0.0) for result in results]
            axes.barh(range(len(results)), widths, left=left, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set(yticks=[], xlabel="% of the time", xlim=(0, 100))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(parts), frameon=False)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()
