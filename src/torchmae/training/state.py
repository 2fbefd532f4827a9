"""The state of a run, saved in checkpoints and restored from them; the errors of a run that ends early."""

from __future__ import annotations

import math
import shlex
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchmae.errors import CheckpointError, Interrupted, TrainingError, reason_of
from torchmae.training.checkpoint import Checkpoint, save_checkpoint
from torchmae.training.parallel import load_optimizer, local
from torchmae.training.ranks import Ranks
from torchmae.training.run_folder import RunFolder
from torchmae.training.task import Task

LARGEST_USUAL = 100.0  # standard deviations; a larger input value is probably a fill value


@dataclass
class State:
    """The state of a run, stored in every checkpoint. Checkpoints of earlier versions lack some fields with defaults.

    With `LoopSettings.per_epoch`, the epoch's sums run over images, else over steps.
    """

    step: int  # optimiser steps done
    total_steps: int  # of the whole run, which fixes the schedule
    seconds: float = 0.0  # training time without evaluation and saving
    epoch_loss: float = 0.0  # sum of the losses of the current epoch
    precision: str = "fp32"  # or "bf16"; a resumed run keeps it
    data: str = ""  # fingerprint of the training data
    epoch_skipped: int = 0  # number of skipped steps of the current epoch
    lr_scale: float = 1.0  # factor of the learning rate, halved at each roll-back
    loss: float = 0.0  # mean of the last whole epoch
    first_steps: int | None = None  # of the first of two stages; None: there is one
    stage: int = 0  # that trains now, from 0
    second_step: float = 1.0  # time of a step of the second stage over one of the first; not measured: 1
    job: dict[str, Any] = field(default_factory=dict)  # settings, images and seed of a fine-tuning

    @property
    def span(self) -> tuple[int, int]:
        """First step of the current stage, and last step plus 1. Each stage has its own learning-rate schedule."""
        boundary = self.total_steps if self.first_steps is None else self.first_steps
        return (0, boundary) if self.stage == 0 else (boundary, self.total_steps)

    @property
    def remaining(self) -> float:
        """Remaining time of the run, in steps of the current stage; a step of the next stage counts `second_step`."""
        end = self.span[1]
        return end - self.step + (self.total_steps - end) * self.second_step


def save(folder: RunFolder, task: Task, state: State) -> None:
    """Saves a checkpoint; every rank calls it.

    Raises:
        TrainingError: a weight or an optimiser's moment is not finite; nothing is written.
        CheckpointError: the disk is full or cannot be written.
    """
    ranks = task.runtime.ranks
    if not all_finite(task.model, task.optimizers, ranks):
        raise diverged(f"the weights are not finite after step {state.step}", task, folder)
    optimizer_states = [item.state_dict() for item in task.optimizers]
    save_checkpoint(folder.checkpoints, task.model.state_dict(), optimizer_states, asdict(state), ranks)


def all_finite(model: nn.Module, optimizers: Sequence[Optimizer], ranks: Ranks) -> bool:
    """Whether every weight and moment is finite on all ranks; every rank calls it."""
    moments = [
        value
        for optimizer in optimizers
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    ]
    numbers = [local(value.detach()) for value in (*model.parameters(), *moments)]
    largest = torch.nn.utils.get_total_norm([value for value in numbers if value.numel()], math.inf).item()
    return not ranks.all_reduce_max(float(not math.isfinite(largest)))[0]


def restore(checkpoint: Checkpoint, model: nn.Module, optimizers: Sequence[Optimizer], precision: str) -> State:
    """Loads a checkpoint into model and optimisers, which keep their settings; returns its state with `precision`.

    Raises:
        CheckpointError: another model or optimiser wrote it.
    """
    difference = differs(checkpoint.model, model.state_dict())
    if difference:
        raise CheckpointError(
            f"{checkpoint.path} does not fit the model: {difference}", "resume with the run's own settings"
        )
    try:
        model.load_state_dict(checkpoint.model)
        for optimizer, saved in zip(optimizers, checkpoint.optimizers, strict=True):
            load_optimizer(optimizer, saved)
        state = State(**{**checkpoint.state, "precision": precision})
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{checkpoint.path} does not fit the model: {reason_of(error)}", "resume with the run's own settings"
        ) from error
    return state


def differs(saved: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """The first weight whose shape differs between a checkpoint and a model, and how many more; empty if all fit."""
    found = []
    for name in [*own, *(name for name in saved if name not in own)]:
        there, here = (tuple(side[name].shape) if name in side else None for side in (saved, own))
        if there != here:
            found.append(f"{name} is {there or 'missing'} in the checkpoint and {here or 'missing'} in the model")
    return "" if not found else found[0] + (f", and {len(found) - 1} more differ" if len(found) > 1 else "")


def diverged(problem: str, task: Task, folder: RunFolder, images: Tensor | None = None) -> TrainingError:
    """The error of a run with numbers that are not finite; `images` is the newest batch, normalised."""
    values = f"; {input_range(images)}" if images is not None and images.numel() else ""
    return TrainingError(
        f"{problem}{values}; the last good checkpoint was kept",
        task.fixes.diverged.format(folder=shlex.quote(str(folder.path))),
    )


def input_range(images: Tensor) -> str:
    """The range of normalised input values in words, with a hint if it is far from 0."""
    finite = images[images.isfinite()].float()
    count = images.numel() - finite.numel()
    texts = [f"{count:,} input values are not finite"] if count else []
    if finite.numel():
        low, high = finite.min().item(), finite.max().item()
        texts.append(f"input values of the last step lie from {low:.3g} to {high:.3g} after normalisation")
        if max(-low, high) > LARGEST_USUAL:
            texts.append("which is far from 0: `torchmae data inspect` shows fill values, --data.nodata takes them out")
    return ", ".join(texts)


def interrupted(signal_number: int, state: State, task: Task, folder: RunFolder) -> Interrupted:
    """The error of a run that a signal ended."""
    name = signal.Signals(signal_number).name
    problem = f"stopped by {name} after step {state.step} of {state.total_steps}, all saved"
    return Interrupted(problem, task.fixes.interrupted.format(folder=shlex.quote(str(folder.path))), signal_number)
