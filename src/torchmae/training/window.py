"""The steps between two lines of the log: their losses and speed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchmae.data.loader import Batch, Plan
from torchmae.training.progress import Display, Status
from torchmae.training.state import State
from torchmae.training.task import Task
from torchmae.training.tracking import Tracker


class Step(NamedTuple):
    """The result of a step: tensors on the device, the same on all ranks."""

    loss: Tensor  # scalar, of the batch
    norm: Tensor  # scalar, of the gradients before clipping
    losses: Tensor  # (T,), one for each of `Task.names`


class Window:
    """The steps since the last line of the log. Losses stay on the device until the window closes.

    Attributes:
        figures: scalars of its last step, to be logged.
        longest_skipped: largest number of steps skipped in a row, counted across windows.
    """

    def __init__(self) -> None:
        self._steps: list[Tensor] = []  # of each: its loss, its gradient's norm, and the losses that are logged
        self._images: list[int] = []  # of each step
        self._skipped_in_row = 0  # before the next step
        self._waited = 0.0
        self._since = time.perf_counter()
        self.longest_skipped = 0
        self.figures: dict[str, Tensor] = {}

    def add(self, step: Step, images: int) -> None:
        """Adds a step; a step whose loss or gradient norm is not finite was skipped."""
        self._steps.append(torch.cat([torch.stack([step.loss, step.norm]), step.losses]))
        self._images.append(images)

    def forget_skipped(self) -> None:
        """Resets the count of skipped steps after a roll-back."""
        self.longest_skipped = self._skipped_in_row = 0

    def restart(self) -> None:
        """Restarts the clock of an empty window, so that evaluation and saving are not counted."""
        if not self._steps:
            self._since = time.perf_counter()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields the batches and measures the time spent waiting for them."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def close(self, state: State, plan: Plan, task: Task, tracker: Tracker, display: Display) -> None:
        """Waits for the device, warns about skipped steps and logs figures; an empty window does nothing."""
        if not self._steps:
            return
        steps = torch.stack(self._steps).tolist()
        seconds = time.perf_counter() - self._since
        taken = []  # the losses of each step that was not skipped
        self.longest_skipped = 0
        for i, ((loss, norm, *losses), images) in enumerate(zip(steps, self._images, strict=True), 1):
            weight = images if task.loop.per_epoch else 1
            if math.isfinite(loss) and math.isfinite(norm):
                self._skipped_in_row = 0
                taken.append(losses)
                state.epoch_loss += losses[0] * weight
                continue
            self._skipped_in_row += 1
            self.longest_skipped = max(self.longest_skipped, self._skipped_in_row)
            state.epoch_skipped += weight
            number = state.step - len(steps) + i
            display.warn(f"step {number} skipped: the loss is {loss:.4g} and the gradient's norm {norm:.4g}")
        skipped = len(steps) - len(taken)
        state.seconds += seconds
        speed, wait = sum(self._images) / seconds, self._waited / seconds
        means = [sum(column) / len(taken) for column in zip(*taken, strict=True)] or [math.nan] * len(task.names)
        remaining = state.remaining * seconds / len(steps)
        epoch, epochs = state.step / plan.steps_per_epoch, state.total_steps / plan.steps_per_epoch
        figures = {
            "epoch": epoch,
            "loss": means[0],  # of the first target alone, as is the loss on held-out images
            **{f"loss_{name}": mean for name, mean in zip(task.names[1:], means[1:], strict=True)},
            "lr": task.optimizers[-1].param_groups[-1]["lr"],
            **{name: figure.item() for name, figure in self.figures.items()},
            **({"skipped": skipped} if skipped else {}),
            "images_per_s": speed,
            "data_wait": wait,
            "seconds": state.seconds,
        }
        if not task.loop.per_epoch:
            tracker.log("train", state.step, figures)
        display.training(Status(state.step, state.total_steps, epoch, epochs, means[0], speed, wait, remaining))
        self._steps, self._images, self.figures, self._waited = [], [], {}, 0.0
