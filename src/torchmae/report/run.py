"""A run folder, read leniently: whatever a stopped, unfinished or older run left behind is enough."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from torchmae.errors import CheckpointError

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What a pre-training run wrote, parsed.

    Attributes:
        path: the run folder.
        config: config.yaml as nested dicts; empty if it is missing.
        train: metrics.jsonl's "train" records, one for each step, by rising step.
        val: its "val" records, likewise.
        baseline: its "baseline" records, likewise: figures that need no training.
        summary: summary.json; empty while the run has not ended.
        environment: environment.json; empty if it is missing.
        pictures: (step, file) of reconstructions/*.png, by rising step.
        feature_pictures: pictures/*.png, by name: what the features look like.
        evaluations: the objects of evaluations.jsonl, the oldest first.
        bad_files: lines of bad_files.txt, the input files that could not be read.
    """

    path: Path
    config: Record
    train: tuple[Record, ...]
    val: tuple[Record, ...]
    baseline: tuple[Record, ...]
    summary: Record
    environment: Record
    pictures: tuple[tuple[int, Path], ...]
    feature_pictures: tuple[Path, ...]
    evaluations: tuple[Record, ...]
    bad_files: tuple[str, ...]

    @property
    def records(self) -> tuple[Record, ...]:
        """All records of metrics.jsonl, those of a kind by rising step."""
        return (*self.baseline, *self.train, *self.val)


def load_run(run: Path) -> Run:
    """Reads a run folder.

    Args:
        run: the folder that `torchmae pretrain` wrote.

    Raises:
        CheckpointError: the folder does not exist, holds neither config.yaml nor metrics.jsonl, or cannot be read.
    """
    if not (run / "config.yaml").is_file() and not (run / "metrics.jsonl").is_file():
        missing = "holds neither config.yaml nor metrics.jsonl" if run.is_dir() else "does not exist"
        raise CheckpointError(f"run folder {str(run)!r} {missing}", "give a folder that torchmae pretrain wrote")
    try:
        records = _read_records(run / "metrics.jsonl")
        return Run(
            path=run,
            config=_read_mapping(run / "config.yaml"),
            train=_by_step(records, "train"),
            val=_by_step(records, "val"),
            baseline=_by_step(records, "baseline"),
            summary=_read_mapping(run / "summary.json"),
            environment=_read_mapping(run / "environment.json"),
            pictures=_find_pictures(run / "reconstructions"),
            feature_pictures=tuple(sorted((run / "pictures").glob("*.png"))),
            evaluations=tuple(_read_lines(run / "evaluations.jsonl")),
            bad_files=tuple(line for line in _read_text(run / "bad_files.txt").splitlines() if line.strip()),
        )
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}", "check its permissions") from error


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read_mapping(path: Path) -> Record:
    """YAML or JSON of one mapping; empty where the file is missing, cut short or holds something else."""
    text = _read_text(path)
    try:
        # JSON apart, for YAML 1.1 reads JSON's 1e-05 as text.
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_records(path: Path) -> list[Record]:
    """The records of metrics.jsonl that have a step."""
    return [record for record in _read_lines(path) if isinstance(record.get("step"), int)]


def _read_lines(path: Path) -> list[Record]:
    """The objects of a JSON-lines file. A line that a killed process left half-written is passed over."""
    records: list[Record] = []
    for line in _read_text(path).split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _by_step(records: list[Record], kind: str) -> tuple[Record, ...]:
    """Records of one kind, one for each step; of what a resumed run wrote twice, the later figure counts."""
    merged: dict[int, Record] = {}
    for record in records:
        if record.get("kind") == kind:
            merged[record["step"]] = {**merged.get(record["step"], {}), **record}
    return tuple(merged[step] for step in sorted(merged))


def _find_pictures(folder: Path) -> tuple[tuple[int, Path], ...]:
    steps = ((path.stem.removeprefix("step-"), path) for path in folder.glob("step-*.png"))
    return tuple(sorted((int(step), path) for step, path in steps if step.isdecimal()))
