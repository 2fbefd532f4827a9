"""A run folder in words and round numbers; folders of stopped and older runs may lack files and fields."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from torchmae.errors import CheckpointError
from torchmae.report.metrics import final_figures, finite
from torchmae.words import POINTS, kind_of

Record = Mapping[str, Any]

_DEVICES = {"cpu": "the CPU", "mps": "an Apple GPU"}


@dataclass(frozen=True)
class Run:
    """The parsed files of a pre-training run; a missing file is empty.

    Attributes:
        path: the run folder.
        config: config.yaml as nested dicts.
        train: the "train" records of metrics.jsonl, one for each step, by rising step.
        val: the "val" records, likewise.
        baseline: the "baseline" records, likewise.
        summary: summary.json, written at the end of the run.
        environment: environment.json.
        pictures: (step, file) of reconstructions/*.png, by rising step.
        feature_pictures: pictures/*.png, by name.
        evaluations: the records of evaluations.jsonl, the oldest first.
        bad_files: lines of bad_files.txt, the unreadable input files.
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
        """All records of metrics.jsonl, each kind by rising step."""
        return (*self.baseline, *self.train, *self.val)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration under dotted names."""
        return flat(self.config)

    @cached_property
    def figures(self) -> dict[str, float]:
        """`final_figures` of the run."""
        return final_figures(self.summary, self.val, self.baseline, self.settings.get("eval.knn_val"))

    def latest(self, *keys: str) -> float | None:
        """The first of the keys' figures that is not zero, from the summary or else the last "train" record."""
        value = None
        for key in keys:
            value = finite(self.summary, key)
            value = finite(self.train[-1], key) if value is None and self.train else value
            if value:
                break
        return value

    @property
    def finished(self) -> bool:
        """Whether the run came to its planned end."""
        return self.summary.get("state") == "finished"

    @property
    def state(self) -> str:
        """A sentence on a run that has not finished; empty for one that has."""
        if self.finished:
            return ""
        steps = self.latest("steps", "step")
        reached = f"at step {steps:,.0f}" if steps else "before its first figures"
        if self.summary.get("state") == "interrupted":
            return f"This run was interrupted {reached}. What follows is what it had by then."
        return (
            f"This run has not finished: it stands {reached}, or was stopped there. What follows is what it has so far."
        )

    @property
    def kind(self) -> str:
        """What a sample is, as in `words.kind_of`."""
        kind = self.summary.get("kind")
        return str(kind) if kind in POINTS else kind_of(len(self._size("input_size")))

    @property
    def unit(self) -> str:
        """What a mask removes: "patches", or "values" for a model without patches."""
        return "values" if self.summary.get("patch_size") == [] else "patches"

    @property
    def title(self) -> str:
        """A short name: the network and the last part of the data's name."""
        return " on ".join(part for part in (self._preset, Path(self._data).name) if part)

    @property
    def sentence(self) -> str:
        """A sentence on model, data, mask ratio and duration."""
        shape = self._size("input_size")
        patch = self._size("patch_size") if self.unit == "patches" else ()
        items, points = f"{self.kind}s", f"{POINTS[self.kind]}s"
        preset = f" ({self._preset})" if self._preset else ""
        num_train = finite(self.summary, "num_train")
        count = f"{num_train:,.0f} {items}" if num_train else f"the {items}"
        size = f" ({_product(shape)} {points})" if shape else ""
        patches = f"{_product(patch)}-{points.removesuffix('s')} patches" if patch else self.unit
        share = self.summary.get("mask_ratio", self.settings.get("mask.ratio"))
        masked = ""
        if isinstance(share, (int, float)):
            inverted = str(self.settings.get("mask.strategy")).endswith("_inverted")
            masked = f", with {100 * (1 - share if inverted else share):.0f}% of their {patches} masked"
        return f"A masked autoencoder{preset} was pre-trained on {count} from {self._data}{size}{masked}{self._extent}."

    @property
    def facts(self) -> list[tuple[str, str, str]]:
        """The known figures of the run: (name, figure, remark)."""
        whole = "{:,.0f}".format
        rows = []
        for name, show, keys, remark, show_beside, beside in (
            ("Training set", whole, ("num_train",), "{} held out", whole, "num_val"),
            ("Encoder parameters", short_count, ("params_encoder",), "decoder {}", short_count, "params_decoder"),
            ("Steps", whole, ("steps", "step"), "{} images seen", short_count, "images_seen"),
            ("Training time", duration, ("seconds",), "{} images per second", whole, "images_per_s"),
        ):
            value, other = self.latest(*keys), self.latest(beside)
            if value is not None:
                rows.append((name, show(value), remark.format(show_beside(other)) if other else ""))
        return rows

    @property
    def _extent(self) -> str:
        """Duration and device: ", for 100 epochs in 47 s on the CPU"."""
        epochs, seconds = self.latest("epochs", "epoch"), self.latest("seconds")
        if epochs is None or seconds is None:
            return ""
        device = self.environment.get("device")
        where = f" on {_DEVICES.get(str(device), device)}" if device else ""
        rounded = f"{epochs:.3g}"
        return f", for {rounded} {'epoch' if rounded == '1' else 'epochs'} in {duration(seconds)}{where}"

    @property
    def _preset(self) -> str:
        return str(self.summary.get("preset") or self.settings.get("model.preset") or "")

    @property
    def _data(self) -> str:
        return str(self.summary.get("data") or self.settings.get("data.source") or "unknown data")

    def _size(self, name: str) -> tuple[int, ...]:
        """Size of the input or a patch along each spatial axis; empty where unknown."""
        value = self.summary.get(name) or self.settings.get(f"model.{name}")
        if isinstance(value, int):
            return (value, value)
        return tuple(value) if isinstance(value, (list, tuple)) else ()


def load_run(run: Path) -> Run:
    """Reads a folder that `torchmae pretrain` wrote.

    Raises:
        CheckpointError: the folder does not exist, holds neither config.yaml nor metrics.jsonl, or cannot be read.
    """
    if not (run / "config.yaml").is_file() and not (run / "metrics.jsonl").is_file():
        missing = "holds neither config.yaml nor metrics.jsonl" if run.is_dir() else "does not exist"
        raise CheckpointError(f"run folder {str(run)!r} {missing}", "give a folder that torchmae pretrain wrote")
    try:
        records = [record for record in _read_lines(run / "metrics.jsonl") if isinstance(record.get("step"), int)]
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
    """Records of one kind, one for each step; where a resumed run wrote a step twice, the later figures count."""
    merged: dict[int, Record] = {}
    for record in records:
        if record.get("kind") == kind:
            merged[record["step"]] = {**merged.get(record["step"], {}), **record}
    return tuple(merged[step] for step in sorted(merged))


def _find_pictures(folder: Path) -> tuple[tuple[int, Path], ...]:
    steps = ((path.stem.removeprefix("step-"), path) for path in folder.glob("step-*.png"))
    return tuple(sorted((int(step), path) for step, path in steps if step.isdecimal()))


def flat(config: Record, prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return values


def yaml_text(value: object) -> str:
    """A value of the configuration as YAML in one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.strip().removesuffix("...").strip()


def duration(seconds: float) -> str:
    """A time for people: 4.1 s, 47 s, 12 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def short_count(count: float) -> str:
    """A count in three digits: 950, 12.3k, 5.41M, 1.2G."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{letter}"
    return f"{count:.0f}"


def _product(sizes: Sequence[int]) -> str:
    return "\N{MULTIPLICATION SIGN}".join(str(size) for size in sizes)
