"""RUN/evaluations.jsonl as tables, read leniently: whatever has a method and figures is shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torchmae.report.run import Record
from torchmae.report.verdict import finite

_MAX_TABLES = 6
# What subjects are called on a page, in the order of its columns.
_SUBJECTS = {"model": "This model", "random": "Untrained", "pixels": "Raw pixels"}


class Figure(NamedTuple):
    """A figure as text.

    Attributes:
        value: the figure; empty where there is none.
        interval: its confidence interval; may be empty.
    """

    value: str = ""
    interval: str = ""


@dataclass(frozen=True)
class FigureTable:
    """One evaluation.

    Attributes:
        title: the method.
        columns: whose figures they are.
        rows: name of a figure, and one for each column.
        remark: on how many images; may be empty.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Figure, ...]], ...]
    remark: str


def evaluation_tables(records: Sequence[Record]) -> tuple[list[FigureTable], int]:
    """The latest evaluations as tables, each kind of it once, and how many others there were.

    Args:
        records: the objects of evaluations.jsonl, the oldest first.
    """
    latest: dict[str, FigureTable] = {}
    for record in records:
        by_subject = figures_of(record)
        if by_subject:
            key = json.dumps([_title(record), record.get("options"), record.get("configuration")], sort_keys=True)
            latest.pop(key, None)
            latest[key] = _table(record, by_subject)
    shown = list(reversed(latest.values()))[:_MAX_TABLES]
    return shown, len(latest) - len(shown)


def figures_of_run(records: Sequence[Record]) -> dict[str, Figure]:
    """Every figure of the run's own model, by its name; of one measured twice, the later."""
    merged: dict[str, Figure] = {}
    for record in records:
        by_subject = figures_of(record)
        own = by_subject.get("model") or next(iter(by_subject.values()), {})
        shots = _shots(record)
        merged |= {f"{name}{f', {shots}' if shots else ''}": value for name, value in _texts(own).items()}
    return merged


def figures_of(record: Record) -> dict[str, dict[str, float]]:
    """The finite figures of a record, by subject; a record without a list of results is its own only result."""
    results = record.get("results")
    found: dict[str, dict[str, float]] = {}
    for result in results if isinstance(results, list) else [record]:
        figures = result.get("figures") if isinstance(result, dict) else None
        if isinstance(figures, dict):
            subject = str(result.get("subject") or "model")
            numbers = {str(name): value for name in figures if (value := finite(figures, name)) is not None}
            found.setdefault(subject, {}).update(numbers)
    return {subject: numbers for subject, numbers in found.items() if numbers}


def _table(record: Record, by_subject: Mapping[str, Mapping[str, float]]) -> FigureTable:
    subjects = sorted(by_subject, key=lambda name: list(_SUBJECTS).index(name) if name in _SUBJECTS else -1)
    texts = [_texts(by_subject[name]) for name in subjects]
    names = list(dict.fromkeys(name for column in texts for name in column))
    return FigureTable(
        title=_title(record),
        columns=tuple(_SUBJECTS.get(name, name) for name in subjects),
        rows=tuple((name, tuple(column.get(name, Figure()) for column in texts)) for name in names),
        remark=_remark(record),
    )


def _title(record: Record) -> str:
    """The methods of a record's results, each once; "all" says less."""
    results = record.get("results")
    methods = [item.get("method") for item in results if isinstance(item, dict)] if isinstance(results, list) else []
    names = dict.fromkeys(str(method) for method in methods or [record.get("method") or "evaluation"])
    return ", ".join(part for part in (*names, _shots(record)) if part)


def _shots(record: Record) -> str:
    options = record.get("options")
    count = finite(options, "labels_per_class") if isinstance(options, dict) else None
    return "" if count is None else f"{count:,.0f} labels per class"


def _remark(record: Record) -> str:
    data = record.get("data")
    train, test = (finite(data, f"{split}_images") if isinstance(data, dict) else None for split in ("train", "test"))
    date = str(record.get("time") or "")[:10]
    parts = [
        f"{train:,.0f} training images" if train else "",
        f"{test:,.0f} test images" if test else "",
        date,
    ]
    return ", ".join(part for part in parts if part)


def _texts(figures: Mapping[str, float]) -> dict[str, Figure]:
    """Figures as text; name_low and name_high are the interval of the figure of that name."""
    texts = {}
    for name, value in figures.items():
        stem = name.removesuffix("_low").removesuffix("_high")
        if stem != name and stem in figures:
            continue
        ends = [figures.get(f"{name}_low"), figures.get(f"{name}_high")]
        known = [_number(end) for end in ends if end is not None]
        texts[name] = Figure(_number(value), " to ".join(known) if len(known) == 2 else "")
    return texts


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
