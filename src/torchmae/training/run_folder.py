"""The run folder: names of its files, and a lock."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from torchmae.errors import CheckpointError, ConfigError
from torchmae.files import lock_file, replace_file


class RunFolder:
    """Names and writes the files of a run.

    config.yaml, environment.json, metrics.jsonl, checkpoints/, reconstructions/, pictures/, evaluations.jsonl,
    model.json, model.safetensors, summary.json, report.html, bad_files.txt; with trackers also tracking.json,
    tensorboard/, wandb/.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_new = False
        self._lock: BinaryIO | None = None
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.reconstructions = path / "reconstructions"
        self.model_json = path / "model.json"
        self.weights = path / "model.safetensors"
        self.summary = path / "summary.json"
        self.environment = path / "environment.json"
        self.bad_files = path / "bad_files.txt"

    @classmethod
    def create(cls, path: Path, *, rename: bool = False) -> RunFolder:
        """Makes the folder of a new run; with `rename`, PATH-2, PATH-3 and so on if the name is taken.

        Raises:
            ConfigError: it holds a run that took a step (else see `clear_start`) or other files, or it cannot be
                written to.
        """
        try:
            folder = cls(_make_new(path) if rename else path)
            path = folder.path
            begun = folder.config.exists()
            if begun and folder._took_steps():
                raise ConfigError(
                    f"{path} holds a run already", f"resume it with --resume {path}, or choose another --out"
                )
            empty = path.is_dir() and all(item.name.startswith(".") for item in path.iterdir())  # interrupted writes
            if not begun and path.exists() and not empty:
                raise ConfigError(f"{path} exists and is not an empty folder", "choose another --out")
            folder._is_new = rename or not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"cannot write to {path}: {error.strerror}", "choose another --out") from error
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Opens the folder of an existing run; CheckpointError if it is none."""
        if not (path / "config.yaml").is_file():
            what = "is not a run folder (it has no config.yaml)" if path.exists() else "does not exist"
            raise CheckpointError(f"{path} {what}", "give the folder that `torchmae pretrain --out` made")
        return cls(path)

    def lock(self) -> None:
        """Locks the folder until `close` or the end of this process; CheckpointError if another process holds it."""
        try:
            self._lock = lock_file(self.path / ".lock")
        except BlockingIOError as error:
            raise CheckpointError(
                f"another process is training in {self.path}", "wait for it, stop it, or choose another --out"
            ) from error

    def clear_start(self) -> None:
        """Removes the files of a run that failed before its first step; needs the lock."""
        for name in ("config.yaml", "environment.json", "metrics.jsonl", "tracking.json"):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _took_steps(self) -> bool:
        """Whether the run logged or saved a step, or ended."""
        saved = {item.name for item in self.checkpoints.glob("step-*")} - {"step-00000000"}  # saved at the start
        logged = any(record.get("kind") == "train" for record in self.read_metrics())
        return bool(saved) or logged or self.weights.exists()

    def close(self) -> None:
        """Releases the lock; removes the folder if `create` made it and nothing was written to it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._is_new and [item.name for item in self.path.glob("*")] == [".lock"]:  # none where it was deleted
            (self.path / ".lock").unlink()
        if self._is_new:
            with suppress(OSError):  # not empty
                self.path.rmdir()

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file of the run atomically."""
        replace_file(self.path / name, text.encode("utf-8"))

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Writes a JSON file of the run atomically."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def remove_results(self) -> None:
        """Removes the final weights and summary, so that the newest checkpoint is the run's result."""
        for path in (self.weights, self.summary):
            path.unlink(missing_ok=True)

    def first_start(self) -> dict[str, Any]:
        """Command, start time and torchrun's job from an existing environment.json; empty if there is none."""
        try:
            values = json.loads(self.environment.read_text(encoding="utf-8"))
            return {name: values[name] for name in ("command", "started", "job") if name in values}
        except (OSError, ValueError, TypeError):
            return {}

    def read_metrics(self) -> list[dict[str, Any]]:
        """Reads metrics.jsonl up to the first incomplete line."""
        if not self.metrics.exists():
            return []
        records = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def rewind_metrics(self, step: int) -> None:
        """Removes the lines of steps after `step`, which the run will write again, and an incomplete last line.

        The file is truncated in place: a tracker that has it open continues at the new end.
        """
        if not self.metrics.exists():
            return
        length = 0
        for line in self.metrics.read_bytes().splitlines(keepends=True):
            try:
                if json.loads(line).get("step", 0) > step:
                    break
            except (ValueError, AttributeError):
                break
            length += len(line)
        os.truncate(self.metrics, length)


def _make_new(path: Path) -> Path:
    """Makes the folder PATH, or the first of PATH-2, PATH-3, ... that does not exist; safe between processes."""
    for number in range(1, 1000):
        free = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            free.mkdir(parents=True)
        except FileExistsError:
            continue
        return free
    return path  # another problem, which `create` reports
