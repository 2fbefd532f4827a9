"""The folder of one run: the names of its files, and a lock."""

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
    model.json and model.safetensors, summary.json, report.html, bad_files.txt; of trackers that were asked for
    tracking.json, tensorboard/, wandb/.

    Args:
        path: the folder.
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
        """The folder of a new run; with `rename`, PATH-2, PATH-3 and so on where the name is taken.

        Raises:
            ConfigError: it holds a run that took a step (see `clear_start`) or other files, or cannot be written.
        """
        try:
            folder = cls(_make_new(path) if rename else path)
            path = folder.path
            begun = folder.config.exists()
            if begun and folder._took_steps():
                raise ConfigError(
                    f"{path} holds a run already", f"resume it with --resume {path}, or choose another --out"
                )
            if not begun and path.exists() and not (path.is_dir() and _is_empty(path)):
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
        """An existing run's folder; CheckpointError when it is none."""
        if not (path / "config.yaml").is_file():
            what = "is not a run folder (it has no config.yaml)" if path.exists() else "does not exist"
            raise CheckpointError(f"{path} {what}", "give the folder that `torchmae pretrain --out` made")
        return cls(path)

    def lock(self) -> None:
        """Locks the folder until `close` or the end of this process; CheckpointError where another process has it."""
        try:
            self._lock = lock_file(self.path / ".lock")
        except BlockingIOError as error:
            raise CheckpointError(
                f"another process is training in {self.path}", "wait for it, stop it, or choose another --out"
            ) from error

    def clear_start(self) -> None:
        """Removes what a run left that failed before its first step; call with the lock."""
        for name in ("config.yaml", "environment.json", "metrics.jsonl", "tracking.json"):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _took_steps(self) -> bool:
        """Whether a run got further than its start: a step that was logged or saved, or an end."""
        saved = {item.name for item in self.checkpoints.glob("step-*")} - {"step-00000000"}  # saved before the first
        logged = any(record.get("kind") == "train" for record in self.read_metrics())
        return bool(saved) or logged or self.weights.exists()

    def close(self) -> None:
        """Lets other runs in; removes the folder again if `create` made it and nothing was written to it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._is_new and [item.name for item in self.path.iterdir()] == [".lock"]:
            (self.path / ".lock").unlink()
        if self._is_new:
            with suppress(OSError):  # not empty
                self.path.rmdir()

    def write_text(self, name: str, text: str) -> None:
        """Writes a file of the run, whole or not at all."""
        replace_file(self.path / name, text.encode("utf-8"))

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Writes a JSON file of the run, whole or not at all."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def remove_results(self) -> None:
        """Removes weights and summary of an interrupted part of the run: now the newest checkpoint is what it has."""
        for path in (self.weights, self.summary):
            path.unlink(missing_ok=True)

    def first_start(self) -> dict[str, Any]:
        """When and by what command the run was started, of an environment.json that is there already."""
        try:
            values = json.loads(self.environment.read_text(encoding="utf-8"))
            return {name: values[name] for name in ("command", "started")}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that was cut short is left out."""
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
        """Cuts off the lines of steps after `step`, which the run will write again, and a last line that is not whole.

        In place: a tracker that has the file open goes on at its new end.
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
    """Makes the folder PATH, or PATH-2, PATH-3 and so on: the first that is not there yet, whoever else tries."""
    for number in range(1, 1000):
        free = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            free.mkdir(parents=True)
        except FileExistsError:
            continue
        return free
    return path  # something else is wrong there: whoever uses it says what


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what a write that was cut short left behind."""
    return all(item.name.startswith(".") for item in folder.iterdir())
