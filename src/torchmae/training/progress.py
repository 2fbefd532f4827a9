"""Progress display: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


@dataclass(frozen=True)
class Status:
    """The progress of a run; loss and speeds are means since the last status."""

    step: int  # optimiser steps done
    total: int  # of the run
    epoch: float  # passes over the data, with fraction
    epochs: float  # of the run
    loss: float
    images_per_s: float
    data_wait: float  # share of the time spent waiting for data, 0 to 1
    eta_s: float  # seconds of training left at this speed

    def line(self) -> str:
        """The status in one line, the most important values first: a narrow terminal cuts off the end."""
        return (
            f"epoch {self.epoch:.1f}/{self.epochs:.1f}  step {self.step}/{self.total}  loss {self.loss:.4f}  "
            f"eta {clock(self.eta_s)}  {self.images_per_s:,.0f} images/s  data wait {self.data_wait:.1%}"
        )


class Display:
    """Shows progress on a stream (default: standard error).

    `mode` is "auto" (a live bar on a terminal, else plain lines), "plain", "epochs" (only one line per epoch, on
    standard output), or "none".
    """

    PLAIN_INTERVAL_S = 10.0

    def __init__(self, mode: str, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._mode = ("live" if self._console.is_terminal else "plain") if mode == "auto" else mode
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = time.monotonic()

    def say(self, text: str) -> None:
        """Prints a line, unless the mode is "none" or "epochs"."""
        if self._mode not in ("none", "epochs"):
            self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Prints a line in every mode."""
        self._console.print(text, markup=False)

    def preparing(self, what: str, done: int, total: int) -> None:
        """Shows the progress of work outside training, such as reading images: `done` of `total`."""
        if self._mode == "live":
            self._show(f"{what} {done:,}/{total:,}", done, total)
            if done >= total:
                self.close()
        elif done >= total or time.monotonic() - self._last_line > self.PLAIN_INTERVAL_S:
            self._last_line = time.monotonic()
            self.say(f"{what}: {done:,} of {total:,}")

    def training(self, status: Status) -> None:
        """Shows the progress of training."""
        if self._mode == "live":
            self._show(status.line(), status.step, status.total)
        elif status.step >= status.total or time.monotonic() - self._last_line > self.PLAIN_INTERVAL_S:
            self._last_line = time.monotonic()
            self.say(status.line())

    def epoch(self, number: int, epochs: int, loss: float) -> None:
        """Prints the mean loss of a finished epoch in the mode "epochs"."""
        if self._mode == "epochs":
            print(f"Epoch [{number}/{epochs}], Loss: {loss:.4f}", flush=True)

    def close(self) -> None:
        """Ends the live bar; its last state stays on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, text: str, done: int, total: int) -> None:
        if self._bar is None:
            columns = BarColumn(24), TextColumn("{task.description}")
            self._bar = Progress(*columns, console=self._console, refresh_per_second=2)  # drawing slows training
            self._task = self._bar.add_task(text, total=total)
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, description=text, completed=done, total=total)


def clock(seconds: float) -> str:
    """Formats seconds as 1:02:03, or 2:03 below an hour."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
