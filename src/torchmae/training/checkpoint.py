"""Atomic checkpoints with checksums.

A checkpoint is a folder `checkpoints/step-00001234` with

    model.safetensors   weights
    optimizer.pt        optimiser state: tensors and numbers only, read with weights_only=True
    state.json          step, schedule length, and the other fields of `State`
    checksums.json      SHA-256 of the other files

Where ranks hold shards of the model (FSDP2), the first two are replaced by

    shards/             weights and optimiser state: one safetensors file per rank, read by any number of ranks
    param_groups.json   settings of the optimisers' parameter groups

It is written under a temporary name, flushed to disk, and renamed. The previous checkpoint is kept beside it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchmae.errors import CheckpointError, reason_of
from torchmae.files import flush, seen_late
from torchmae.training.parallel import is_sharded
from torchmae.training.ranks import ALONE, Ranks

KEEP = 2
_WRITING = ".writing-"
_WHOLE = frozenset({"model.safetensors", "optimizer.pt", "state.json"})
_SHARDED = frozenset({"param_groups.json", "state.json"})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read from `path`: state_dicts, and `state`: JSON values, among them "step"."""

    model: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    state: dict[str, Any]
    path: Path


def save_checkpoint(
    folder: Path,
    model: dict[str, Tensor],
    optimizers: list[dict[str, Any]],
    state: dict[str, Any],
    ranks: Ranks = ALONE,
) -> Path:
    """Writes `folder/step-...`, then removes all other checkpoints except the previous one.

    All `ranks` call this. Every rank writes its own shards; a model without shards is written by rank 0. `state` holds
    JSON values, among them "step".

    Raises:
        CheckpointError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    final = folder / f"step-{state['step']:08d}"
    writing = folder / f"{_WRITING}{state['step']:08d}"
    sharded = any(is_sharded(tensor) for tensor in model.values())

    def begin() -> None:
        with _cannot_save(writing, state["step"]):
            folder.mkdir(exist_ok=True)  # without parents: a run folder that the user deleted is not made again
            clean(folder)
            writing.mkdir()

    def end() -> None:
        with _cannot_save(writing, state["step"]):
            if sharded:
                groups = [optimizer["param_groups"] for optimizer in optimizers]
                (writing / "param_groups.json").write_text(json.dumps(groups), encoding="utf-8")
            else:
                weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.items()}
                save_file(weights, writing / "model.safetensors")
                with (writing / "optimizer.pt").open("wb") as file:  # given a path, torch would not name a full disk
                    torch.save(optimizers, file)
            (writing / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
            _seal(writing, final)

    ranks.on_main(begin)
    if sharded:
        from torchmae.training.sharded import write_shards

        with _cannot_save(writing, state["step"]):
            write_shards(writing / "shards", model, optimizers)
    ranks.on_main(end)
    if ranks.is_main:
        steps = _steps(folder)
        for other in set(steps) - set(steps[: steps.index(final) + 1][-KEEP:]):  # later ones are damaged
            shutil.rmtree(other, ignore_errors=True)
    return final


def _seal(writing: Path, final: Path) -> None:
    """Adds checksums, flushes everything to disk, and renames the folder."""
    files = sorted(path for path in writing.rglob("*") if path.is_file())
    sums = {path.relative_to(writing).as_posix(): _sha256(path) for path in files}
    (writing / "checksums.json").write_text(json.dumps(sums, indent=1), encoding="utf-8")
    for path in writing.rglob("*"):
        flush(path)
    flush(writing)
    if final.exists():  # a damaged checkpoint of the same step, skipped on resume
        shutil.rmtree(final)
    writing.rename(final)
    flush(final.parent)


@contextmanager
def _cannot_save(writing: Path, step: int) -> Iterator[None]:
    """Converts a failure to write into a one-line CheckpointError and removes the unfinished folder."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # a full disk, in Python, safetensors and torch.save
        shutil.rmtree(writing, ignore_errors=True)
        raise CheckpointError(
            f"cannot save the checkpoint of step {step} in {writing.parent}: {reason_of(error)}",
            "free space or mend the folder, then resume the run",
        ) from error


def load_checkpoint(
    folder: Path, notice: Callable[[str], None] | None = None, ranks: Ranks = ALONE
) -> Checkpoint | None:
    """Reads the newest whole checkpoint in `folder`; None when the folder has no checkpoint.

    All `ranks` call this; rank 0 chooses the checkpoint. `notice` gets one line for each damaged checkpoint that is
    skipped.

    Raises:
        CheckpointError: all checkpoints are damaged, or a rank cannot read the checkpoint that rank 0 chose.
    """

    def newest() -> str | None:
        damaged: list[str] = []
        for path in reversed(_steps(folder)):
            problem = verify(path)
            if problem is None:
                if notice is not None:
                    for text in damaged:
                        notice(f"{text}; going on from {path.name}")
                return path.name
            damaged.append(f"{path} is damaged ({problem})")
        if damaged:
            raise CheckpointError(f"no whole checkpoint is left: {damaged[0]}", "start again in another folder")
        return None

    def read() -> Checkpoint | None:
        if name is None:
            return None
        path = folder / name
        # The last file of a checkpoint that is renamed into place as a whole.
        seen = ranks.is_main or seen_late(path / "checksums.json")
        problem = None if ranks.is_main else verify(path) if seen else "it does not show up here"
        if problem is not None:
            raise CheckpointError(f"rank 0 goes on from {path}: {problem}", "let all machines see one run folder")
        return _read(path)

    name = ranks.on_main(newest)
    return ranks.together(read)


def verify(path: Path) -> str | None:
    """Compares a checkpoint's files with their checksums; returns the problem in a few words, or None."""
    try:
        sums = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
        for name in sorted({*sums, *(_SHARDED if "param_groups.json" in sums else _WHOLE)}):
            file = path / name
            if Path(name).is_absolute() or ".." in Path(name).parts or (file.exists() and not file.is_file()):
                return f"{name!r} is no file of it"  # it could be a device, and reading a device never ends
            if _sha256(file) != sums[name]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
    return None


def clean(folder: Path) -> None:
    """Removes the folders of interrupted writes."""
    for path in folder.glob(f"{_WRITING}*"):
        shutil.rmtree(path, ignore_errors=True)


def _read(path: Path) -> Checkpoint:
    """Reads a checkpoint with matching checksums; CheckpointError if `save_checkpoint` did not write it."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if (path / "shards").is_dir():
            from torchmae.training.sharded import read_shards

            groups = json.loads((path / "param_groups.json").read_text(encoding="utf-8"))
            return Checkpoint(*read_shards(path / "shards", groups), state, path)
        optimizers = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        if not isinstance(state["step"], int) or not isinstance(optimizers, list):
            raise TypeError("its step is no number, or its optimisers are no list")
        return Checkpoint(load_file(path / "model.safetensors"), optimizers, state, path)
    except Exception as error:  # torch.load and safetensors fail in many ways on files from elsewhere
        raise CheckpointError(
            f"{path} is no checkpoint of torchmae: {reason_of(error)}", "start again in another folder"
        ) from error


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
