"""A run folder: read leniently, as a stopped or older run may have left it, and said in words and round numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from torchmae.errors import CheckpointError
from torchmae.report.metrics import finite

Record = Mapping[str, Any]

# What the data and the points of its grid are called, by the number of spatial dimensions.
_KINDS = {1: ("signals", "samples"), 2: ("images", "pixels"), 3: ("volumes", "voxels")}
_DEVICES = {"cpu": "the CPU", "mps": "an Apple GPU"}


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
    """Reads a folder that `torchmae pretrain` wrote.

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


def title(run: Run) -> str:
    """A short name of the run: the network and the last part of the data's name."""
    return " on ".join(part for part in (_preset(run), Path(_data(run)).name) if part)


def describe(run: Run) -> str:
    """What was trained, in one sentence."""
    shape = _size(run, "input_size")
    patch = _size(run, "patch_size") if hidden_unit(run) == "patches" else ()
    items, points = _KINDS.get(len(shape), _KINDS[2])
    preset = f" ({_preset(run)})" if _preset(run) else ""
    num_train = finite(run.summary, "num_train")
    count = f"{num_train:,.0f} {items}" if num_train else f"the {items}"
    size = f" ({_product(shape)} {points})" if shape else ""
    hidden = f"{_product(patch)}-{points.removesuffix('s')} patches" if patch else hidden_unit(run)
    share = _hidden_share(run)
    hiding = "" if share is None else f", with {100 * share:.0f}% of their {hidden} hidden"
    return f"A masked autoencoder{preset} was pre-trained on {count} from {_data(run)}{size}{hiding}{_extent(run)}."


def facts(run: Run) -> list[tuple[str, str, str]]:
    """The run in figures: (name, figure, remark); what is unknown is left out."""
    whole = "{:,.0f}".format
    rows = []
    for name, show, keys, remark, show_beside, beside in (
        ("Training set", whole, ("num_train",), "{} held out", whole, "num_val"),
        ("Encoder parameters", short_count, ("params_encoder",), "decoder {}", short_count, "params_decoder"),
        ("Steps", whole, ("steps", "step"), "{} images seen", short_count, "images_seen"),
        ("Training time", duration, ("seconds",), "{} images per second", whole, "images_per_s"),
    ):
        value, other = latest(run, *keys), latest(run, beside)
        if value is not None:
            rows.append((name, show(value), remark.format(show_beside(other)) if other else ""))
    return rows


def state(run: Run) -> str:
    """A sentence for a run that has not finished; empty for one that has."""
    if is_finished(run):
        return ""
    steps = latest(run, "steps", "step")
    reached = f"at step {steps:,.0f}" if steps else "before its first figures"
    if run.summary.get("state") == "interrupted":
        return f"This run was interrupted {reached}. What follows is what it had by then."
    return f"This run has not finished: it stands {reached}, or was stopped there. What follows is what it has so far."


def is_finished(run: Run) -> bool:
    """Whether the run came to its planned end."""
    return run.summary.get("state") == "finished"


def hidden_unit(run: Run) -> str:
    """What is hidden: patches, or single values by a model without patches."""
    return "values" if run.summary.get("patch_size") == [] else "patches"


def setting(run: Run, section: str, name: str) -> Any:
    """A value of the configuration; None where it is missing or null."""
    values = run.config.get(section)
    return values.get(name) if isinstance(values, dict) else None


def yaml_text(value: object) -> str:
    """A value of the configuration as YAML in one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.strip().removesuffix("...").strip()


def latest(run: Run, *keys: str) -> float | None:
    """A figure of the summary, or while there is none, of the last line of progress; the first key that has one."""
    for key in keys:
        value = finite(run.summary, key)
        value = finite(run.train[-1], key) if value is None and run.train else value
        if value:
            return value
    return value


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


def _extent(run: Run) -> str:
    """How long, on what: ", for 100 epochs in 47 s on the CPU"."""
    epochs = latest(run, "epochs", "epoch")
    seconds = latest(run, "seconds")
    if epochs is None or seconds is None:
        return ""
    device = run.environment.get("device")
    where = f" on {_DEVICES.get(str(device), device)}" if device else ""
    rounded = f"{epochs:.3g}"
    return f", for {rounded} {'epoch' if rounded == '1' else 'epochs'} in {duration(seconds)}{where}"


def _preset(run: Run) -> str:
    return str(run.summary.get("preset") or setting(run, "model", "preset") or "")


def _data(run: Run) -> str:
    return str(run.summary.get("data") or setting(run, "data", "source") or "unknown data")


def _hidden_share(run: Run) -> float | None:
    ratio = run.summary.get("mask_ratio", setting(run, "mask", "ratio"))
    if not isinstance(ratio, (int, float)):
        return None
    return 1 - ratio if str(setting(run, "mask", "strategy")).endswith("_inverted") else ratio


def _size(run: Run, name: str) -> tuple[int, ...]:
    """Of the input or a patch, along each spatial axis; empty where unknown."""
    value = run.summary.get(name) or setting(run, "model", name)
    if isinstance(value, int):
        return (value, value)
    return tuple(value) if isinstance(value, (list, tuple)) else ()


def _product(sizes: Sequence[int]) -> str:
    return "\N{MULTIPLICATION SIGN}".join(str(size) for size in sizes)
