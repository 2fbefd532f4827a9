"""Where figures go: metrics.jsonl always, TensorBoard when it is installed, services that are asked for."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from torchmae import settings
from torchmae.config import PretrainConfig
from torchmae.errors import CheckpointError, ConfigError
from torchmae.training.progress import Display
from torchmae.training.run_folder import RunFolder
from torchmae.training.tracking_services import SERVICES, Spared


class Tracker(Protocol):
    """Takes figures and pictures as they come; the configuration, when it is made."""

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Records the values of one moment.

        Args:
            kind: "train", "val", "epoch" or "baseline".
            step: optimiser steps so far.
            values: names and figures.
        """

    def log_picture(self, name: str, step: int, path: Path) -> None:
        """Takes a picture of one moment.

        Args:
            name: what it shows.
            step: optimiser steps so far.
            path: a PNG file of the run folder.
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

    def log_picture(self, name: str, step: int, path: Path) -> None:
        """Nothing: the run folder has the file."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Event files for TensorBoard.

    Args:
        folder: where they go.
        config: the settings as YAML.
        step: the step that the run goes on from; what an earlier part of it logged after that is hidden.

    Raises:
        ImportError: tensorboard is not installed.
        CheckpointError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, config: str = "", step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with _one_line_errors(folder):
            self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)
            self._writer.add_text("config", f"```yaml\n{config}```", step)

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.log`; CheckpointError when the disk is full."""
        with _one_line_errors(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def log_picture(self, name: str, step: int, path: Path) -> None:
        """As `Tracker.log_picture`; CheckpointError when the disk is full."""
        with _one_line_errors(self._folder), Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

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

    def log_picture(self, name: str, step: int, path: Path) -> None:
        """As `Tracker.log_picture`."""
        for tracker in self._trackers:
            tracker.log_picture(name, step, path)

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


def tracker_names(trackers: str) -> tuple[str, ...]:
    """The trackers beside metrics.jsonl that the setting `trackers` asks for.

    Raises:
        ConfigError: the library of one of them is not installed.
    """
    if trackers == "none":
        return ()
    if trackers == "auto":
        return ("tensorboard",) if _is_installed("tensorboard") else ()
    names = tuple(dict.fromkeys(name.strip() for name in trackers.split(",")))
    for name in names:
        if not _is_installed(name):
            raise ConfigError(
                f"trackers is {trackers!r} and {name} is not installed", f"pip install 'torchmae[{name}]'"
            )
    return names


def _is_installed(name: str) -> bool:
    spec = find_spec(name)
    return spec is not None and spec.origin is not None  # a folder ./wandb, left by other runs, has no origin


def open_trackers(config: PretrainConfig, folder: RunFolder, display: Display, step: int = 0) -> Trackers:
    """metrics.jsonl, and what `config.trackers` asks for.

    Args:
        config: the run's, which trackers show too.
        folder: the run's.
        display: says where to look, and what a service that fails says.
        step: the step that the run goes on from.

    Raises:
        CheckpointError: the run folder cannot be written to.
        ConfigError: as for `tracker_names`.
    """
    names = tracker_names(config.trackers)
    trackers: list[Tracker] = [JsonLines(folder.metrics)]
    if "tensorboard" in names:
        with warnings.catch_warnings(), suppress(ImportError) if config.trackers == "auto" else nullcontext():
            warnings.simplefilter("ignore")  # tensorboard's own imports warn
            trackers.append(TensorBoard(folder.path / "tensorboard", settings.to_yaml(config), step))
    for name in names:
        if name in SERVICES:
            trackers.append(Spared(name, folder, asdict(config), say=display.say, warn=display.warn))
    return Trackers(*trackers)


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}", "free space or mend the folder, then resume the run"
        ) from error
