"""RUN/evaluations.jsonl as tables; records that lack fields are shown as far as possible."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torchmae.report.metrics import TRAINING, Figure, Measure, Row, Table, figures_as_text, finite, measure_of, number
from torchmae.report.run import Record, duration

_MAX_RECORDS = 6
# The names of subjects, in the order of a page's columns.
_SUBJECTS = {"model": "This model", "random": "Untrained", "pixels": "Raw pixels"}
# Options that do not change the meaning of a figure on the same images.
_INCIDENTAL = ("method", "data", "test_data", "train_images", "test_images", "preset", "out", "resume")


class Evaluation(NamedTuple):
    """One call of `torchmae evaluate`: methods, a table for each unit, numbers of images and date, command, notes."""

    title: str
    tables: tuple[Table, ...]
    remark: str
    command: str
    notes: tuple[str, ...] = ()


class Measured(NamedTuple):
    """A figure of a run, and its images and options as text: figures of one basis can be compared."""

    figure: Figure
    basis: str


def latest_evaluations(records: Sequence[Record]) -> tuple[list[Evaluation], int]:
    """The latest evaluation of each kind, the newest first, and the number of kinds left out."""
    latest: dict[str, Evaluation] = {}
    for record in records:
        by_subject = figures_of(record)
        if by_subject:
            key = json.dumps([_title(record), record.get("options"), record.get("configuration")], sort_keys=True)
            latest.pop(key, None)
            latest[key] = _evaluation(record, by_subject)
    shown = list(reversed(latest.values()))[:_MAX_RECORDS]
    return shown, len(latest) - len(shown)


def figures_of_run(records: Sequence[Record]) -> dict[tuple[str, str], Measured]:
    """Every figure of the run's own model, by unit and label; the latest where there are several."""
    merged: dict[tuple[str, str], Measured] = {}
    for record in records:
        by_subject = figures_of(record)
        own = by_subject.get("model") or next(iter(by_subject.values()), {})
        for (unit, label, beside), figure in _in_words(own):
            words = (f"{beside} for {label}" if beside else label, _shots(record))
            merged[unit.name, ", ".join(filter(None, words))] = Measured(figure, _basis(record))
    return merged


def figures_of(record: Record) -> dict[str, dict[str, float]]:
    """The finite figures of a record, by subject; a record without a list of results is a single result."""
    results = record.get("results")
    found: dict[str, dict[str, float]] = {}
    for result in results if isinstance(results, list) else [record]:
        figures = result.get("figures") if isinstance(result, dict) else None
        if isinstance(figures, dict):
            subject = str(result.get("subject") or "model")
            numbers = {str(name): value for name in figures if (value := finite(figures, name)) is not None}
            found.setdefault(subject, {}).update(numbers)
    return {subject: numbers for subject, numbers in found.items() if numbers}


def _in_words(figures: Mapping[str, float]) -> Iterator[tuple[Measure, Figure]]:
    """The figures in words, without those of unit `TRAINING`."""
    for name, figure in figures_as_text(figures).items():
        measure = measure_of(name)
        if measure.unit != TRAINING:
            yield measure, figure


def _evaluation(record: Record, by_subject: Mapping[str, Mapping[str, float]]) -> Evaluation:
    cells: dict[str, dict[str, dict[str, Figure]]] = {}  # unit, row, column
    for subject in sorted(by_subject, key=lambda name: list(_SUBJECTS).index(name) if name in _SUBJECTS else -1):
        for (unit, label, beside), figure in _in_words(by_subject[subject]):
            column = beside.capitalize() or _SUBJECTS.get(subject, subject)
            cells.setdefault(unit.name, {}).setdefault(label, {})[column] = figure
    tables = []
    for unit_name, by_label in cells.items():
        columns = tuple(dict.fromkeys(column for row in by_label.values() for column in row))
        filled = (Row(label, tuple(row.get(column, Figure()) for column in columns)) for label, row in by_label.items())
        tables.append(Table(unit_name, columns, tuple(filled)))
    command = str(_mapping(record, "environment").get("command") or "")
    return Evaluation(
        title=_title(record),
        tables=tuple(tables),
        remark=_remark(record, by_subject),
        command=command if command.startswith("torchmae ") else "",
        notes=tuple(str(note) for note in notes) if isinstance(notes := record.get("notes"), list) else (),
    )


def _title(record: Record) -> str:
    """The methods of a record's results, each once, rather than "all"."""
    results = record.get("results")
    methods = [item.get("method") for item in results if isinstance(item, dict)] if isinstance(results, list) else []
    names = dict.fromkeys(str(method) for method in methods or [record.get("method") or "evaluation"])
    return ", ".join(part for part in (*names, _shots(record)) if part)


def _shots(record: Record) -> str:
    count = finite(_mapping(record, "options"), "labels_per_class")
    return "" if count is None else f"{count:,.0f} labels per class"


def _remark(record: Record, by_subject: Mapping[str, Mapping[str, float]]) -> str:
    """Numbers of images, the effort of a fine-tuning, and the date."""
    data = _mapping(record, "data")
    train, test = (finite(data, f"{split}_images") for split in ("train", "test"))
    parts = [f"{train:,.0f} training images" if train else "", f"{test:,.0f} test images" if test else ""]
    for figures in by_subject.values():
        took = {name.rpartition("_")[2]: figures[name] for name in figures if measure_of(name).unit == TRAINING}
        parts += [
            f"{took['images']:,.0f} labels" if "images" in took else "",
            f"{duration(took['seconds'])} of training" if "seconds" in took else "",
            f"training loss {number(took['loss'])}" if "loss" in took else "",
        ]
    date = str(_mapping(record, "environment").get("started") or "")[:10]
    return ", ".join(part for part in (*parts, date) if part)


def _basis(record: Record) -> str:
    """The options and images of a record, as text."""
    kept = {name: value for name, value in _mapping(record, "options").items() if name not in _INCIDENTAL}
    images = {name: value for name, value in _mapping(record, "data").items() if name not in ("classes", "twins")}
    return json.dumps([kept, images], sort_keys=True)


def _mapping(record: Record, key: str) -> Record:
    value = record.get(key)
    return value if isinstance(value, dict) else {}
