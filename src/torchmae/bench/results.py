"""What a benchmark found, as a record, a table and a picture."""

from __future__ import annotations

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

# The figures of a result that the table shows beside images a second: name in the record, heading and form.
FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "share_of_peak": ("of peak", "{:.1%}".format),
    "peak_memory": ("memory, GiB", lambda value: f"{value / 2**30:.2f}"),
    "first_step_s": ("first step, s", "{:.1f}".format),
    "per_worker": ("a worker", "{:,.0f}".format),
}


@dataclass(frozen=True)
class Result:
    """One contender's figures."""

    name: str
    images_per_s: tuple[float, ...]  # one a round
    shares: Mapping[str, float] = field(default_factory=dict)  # of its time, by part; the sum is 1
    figures: Mapping[str, float | None] = field(default_factory=dict)  # others; None: not measurable here

    @property
    def median(self) -> float:
        """Images a second, the median of all rounds."""
        return median(self.images_per_s)


@dataclass(frozen=True)
class Report:
    """A benchmark's figures."""

    title: str
    results: Sequence[Result]  # ours first; the others are compared with it
    notes: Sequence[str]  # sentences below the table
    environment: Mapping[str, Any]  # hardware, versions, command and time
    settings: Mapping[str, Any]

    def ratios(self) -> dict[str, float]:
        """How many times as fast as each other contender the first one is: the ratio of the medians."""
        first, *others = self.results
        return {other.name: first.median / other.median for other in others}

    def text(self) -> str:
        """The figures as a table; its ratios say how many times as fast as that contender the first one is."""
        ratios = self.ratios()
        figures = [name for name in _names(result.figures for result in self.results) if name in FIGURES]
        shares = _names(result.shares for result in self.results)
        table = Table("", box=SIMPLE_HEAD, pad_edge=False)
        headings = [*(["ratio"] if ratios else []), *(FIGURES[name][0] for name in figures), *shares]
        for heading in ("images/s", "low - high", *headings):
            table.add_column(heading, justify="right")
        for result in self.results:
            low, high = min(result.images_per_s), max(result.images_per_s)
            cells = [_rate(result.median), f"{_rate(low)} - {_rate(high)}"]
            if ratios:
                cells.append(f"{ratios[result.name]:.2f}" if result.name in ratios else "")
            for name in figures:
                value = result.figures.get(name)
                cells.append("-" if value is None else FIGURES[name][1](value))
            cells += [f"{result.shares[name]:.0%}" if name in result.shares else "" for name in shares]
            table.add_row(result.name, *cells)
        stream, about, first = StringIO(), self.environment, self.results[0]
        Console(file=stream, width=200).print(table)
        machine = f"{about['processor']}, threads {about['threads']}, torch {about['torch']}"
        lines = [self.title, machine, *(line.rstrip() for line in stream.getvalue().strip("\n").splitlines())]
        if ratios:
            lines.append(f"Ratio: {first.name} over the row's, of the medians of {len(first.images_per_s)} rounds.")
        return "\n".join([*lines, *self.notes])

    def record(self) -> dict[str, Any]:
        """All figures, for a JSON file."""
        results = [{"name": result.name, "median": result.median, **asdict(result)} for result in self.results]
        return {**asdict(self), "results": results, "ratios": self.ratios()}

    def write_plot(self, path: Path) -> None:
        """Writes a PNG picture: images a second (bars from the slowest to the fastest round), and shares of time."""
        from matplotlib.figure import Figure

        results = self.results[::-1]  # bars are drawn from the bottom up
        names, medians = [result.name for result in results], [result.median for result in results]
        below = [result.median - min(result.images_per_s) for result in results]
        above = [max(result.images_per_s) - result.median for result in results]
        parts = _names(result.shares for result in self.results)
        figure = Figure(figsize=(8, 1.6 + 0.5 * len(results)), layout="constrained")
        figure.suptitle(self.title, fontsize=10)
        speed, *rest = figure.subplots(1, 2 if parts else 1, squeeze=False)[0]
        bars = speed.barh(names, medians, xerr=[below, above], color="#4477aa", capsize=3)
        speed.bar_label(bars, [_rate(value) for value in medians], label_type="center", color="white")
        speed.set_xlabel("images/s (line: slowest to fastest round)")
        for axes in rest:
            left = [0.0] * len(results)
            for part in parts:
                widths = [100 * result.shares.get(part, 0.0) for result in results]
                axes.barh(names, widths, left=left, label=part)
                left = [start + width for start, width in zip(left, widths, strict=True)]
            axes.set(yticks=[], xlabel="% of the time", xlim=(0, 100))
            figure.legend(loc="outside lower center", ncols=len(parts), frameon=False)
        content = BytesIO()
        figure.savefig(content, format="png", dpi=150)
        replace_file(path, content.getvalue())


def _names(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for group in groups for name in group))


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
