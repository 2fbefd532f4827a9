"""Where figures go: metrics.jsonl always, TensorBoard when it is installed."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from torchmae.errors import CheckpointError


class Tracker(Protocol):
    """Takes figures as they come."""

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Records the values of one moment.

        Args:
            kind: "train", "val", "epoch" or "baseline".
            step: optimiser steps so far.
            values: names and figures.
        """

    def close(self) -> None:
        """Writes out what is held back."""


class JsonLines:
    """One JSON object a line; each line is with the operating system when `log` returns.

    Args:
        path: the file, appended to.

    Raises:
        CheckpointError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with _one_line_errors(path):
            self._file = path.open("ab", buffering=0)  # a buffer would fail once more when it is closed

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.log`; a figure that is not finite becomes null, for JSON has no other word for it.

        Raises:
            CheckpointError: the disk is full.
        """
        figures = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = (json.dumps({"kind": kind, "step": step, **figures}) + "\n").encode()
        with _one_line_errors(self._path):
            while line:
                line = line[self._file.write(line) :]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard.

    Args:
        folder: where event files go.
        step: the step that the run goes on from; what an earlier part of it logged after that is hidden.

    Raises:
        ImportError: tensorboard is not installed.
        CheckpointError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with _one_line_errors(folder):
            self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.log`; CheckpointError when the disk is full."""
        with _one_line_errors(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Closes the event file; CheckpointError when the disk is full."""
        with _one_line_errors(self._folder):
            self._writer.close()


class Trackers:
    """Several trackers as one; a context manager.

    Args:
        trackers: each gets every figure.
    """

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.log`."""
        for tracker in self._trackers:
            tracker.log(kind, step, values)

    def close(self) -> None:
        """Closes all of them."""
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An error that is under way says more than one that it causes here.
        with suppress(CheckpointError) if error else nullcontext():
            self.close()


def open_trackers(metrics: Path, tensorboard: Path, step: int = 0) -> Trackers:
    """metrics.jsonl, and TensorBoard's event files if the package is installed.

    Args:
        metrics: the file.
        tensorboard: the folder.
        step: as for `TensorBoard`.
    """
    trackers: list[Tracker] = [JsonLines(metrics)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tensorboard's own imports warn
            trackers.append(TensorBoard(tensorboard, step))
    except ImportError:
        pass
    return Trackers(*trackers)


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}", "free space or mend the folder, then resume the run"
        ) from error
