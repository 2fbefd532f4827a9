"""Where figures go: metrics.jsonl always, TensorBoard when it is installed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
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
    """One JSON object a line; each line is on its way to disk when `log` returns.

    Args:
        path: the file, appended to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.log`; CheckpointError when the disk is full."""
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self._path}: {error.strerror}", "free space, then resume the run"
            ) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard.

    Args:
        folder: where event files go.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.log`."""
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Closes the event file."""
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
        self.close()


def open_trackers(metrics: Path, tensorboard: Path) -> Trackers:
    """metrics.jsonl, and TensorBoard's event files if the package is installed."""
    trackers: list[Tracker] = [JsonLines(metrics)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tensorboard's own imports warn
            trackers.append(TensorBoard(tensorboard))
    except ImportError:
        pass
    return Trackers(*trackers)
