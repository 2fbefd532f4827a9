"""The steps between two lines of progress: what they took, and what is said of them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchmae.data.loader import Batch, Plan
from torchmae.training.progress import Display, Status
from torchmae.training.state import State
from torchmae.training.task import Task
from torchmae.training.tracking import Tracker


class Step(NamedTuple):
    """What a step gives: numbers on the device, the same on all ranks, not waited for.

    Attributes:
        loss: scalar, the batch's loss.
        norm: scalar, of the gradients before clipping.
        losses: (T,), the losses that are logged.
    """

    loss: Tensor
    norm: Tensor
    losses: Tensor


class Window:
    """The steps since the last line of progress. Losses stay on the device until the window closes.

    Args:
        now: the time it begins, from time.perf_counter.
        names: of the losses that are logged.
    """

    def __init__(self, now: float, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.steps: list[Tensor] = []  # of each: its loss, its gradient's norm, and the losses that are logged
        self.images: list[int] = []  # of each step
        self.longest_skipped = 0  # steps in a row that were skipped: the longest row that reaches into the window
        self._skipped_in_row = 0  # up to its last step
        self.figures: dict[str, Tensor] = {}  # scalars of its last step
        self.waiting = 0.0
        self.seconds = 0.0
        self._since = now

    def add(self, step: Step, images: int) -> None:
        """A step is done, or was skipped where its loss or its gradient's norm is not finite."""
        self.steps.append(torch.cat([torch.stack([step.loss, step.norm]), step.losses]))
        self.images.append(images)

    def step_counts(self, finite: bool) -> None:
        """In the order of steps: whether one was taken, or skipped."""
        self._skipped_in_row = 0 if finite else self._skipped_in_row + 1
        self.longest_skipped = max(self.longest_skipped, self._skipped_in_row)

    def forget_skipped(self) -> None:
        """Begins to count anew: the run was rolled back."""
        self.longest_skipped = self._skipped_in_row = 0

    def stop_clock(self) -> None:
        """Adds the time since the last restart; call after the device was waited for."""
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now

    def restart(self) -> None:
        """Training goes on: what was spent since `stop_clock` on evaluation and saving does not count."""
        if not self.steps:
            self._since = time.perf_counter()

    def clear(self) -> None:
        """Begins anew."""
        self.steps, self.images, self.waiting, self.seconds, self.figures = [], [], 0.0, 0.0, {}


def timed(batches: Iterator[Batch], window: Window) -> Iterator[Batch]:
    """The same batches; the time spent waiting for each is added to the window."""
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        window.waiting += time.perf_counter() - start
        if batch is None:
            return
        yield batch


def close_window(window: Window, state: State, plan: Plan, task: Task, tracker: Tracker, display: Display) -> None:
    """Waits for the device, says which steps were skipped, logs the window's figures; without a step in it, does
    nothing."""
    if not window.steps:
        return
    steps = torch.stack(window.steps).tolist()
    window.stop_clock()
    taken = []  # the losses of each step that was not skipped
    window.longest_skipped = 0
    for i, ((loss, norm, *losses), images) in enumerate(zip(steps, window.images, strict=True)):
        finite = math.isfinite(loss) and math.isfinite(norm)
        window.step_counts(finite)
        weight = images if task.loop.per_epoch else 1
        if finite:
            taken.append(losses)
            state.epoch_loss += losses[0] * weight
        else:
            state.epoch_skipped += weight
            step = state.step - len(steps) + i + 1
            display.warn(f"step {step} skipped: the loss is {loss:.4g} and the gradient's norm {norm:.4g}")
    skipped = len(steps) - len(taken)
    state.seconds += window.seconds
    speed = sum(window.images) / window.seconds
    means = [sum(column) / len(taken) for column in zip(*taken, strict=True)] or [math.nan] * len(window.names)
    remaining = (state.total_steps - state.step) * window.seconds / len(steps)
    wait = window.waiting / window.seconds
    epoch, epochs = state.step / plan.steps_per_epoch, state.total_steps / plan.steps_per_epoch
    figures = {
        "epoch": epoch,
        "loss": means[0],  # of the first target alone, as is the loss on held-out images
        **{f"loss_{name}": mean for name, mean in zip(window.names[1:], means[1:], strict=True)},
        "lr": task.optimizers[-1].param_groups[-1]["lr"],
        **{name: figure.item() for name, figure in window.figures.items()},
        **({"skipped": skipped} if skipped else {}),
        "images_per_s": speed,
        "data_wait": wait,
        "seconds": state.seconds,
    }
    if not task.loop.per_epoch:
        tracker.log("train", state.step, figures)
    display.training(Status(state.step, state.total_steps, epoch, epochs, means[0], speed, wait, remaining))
    window.clear()
