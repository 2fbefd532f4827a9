"""The task of a trainer: the part of training in which pre-training and fine-tuning differ."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchmae.config import OptimConfig
from torchmae.data.loader import Batch
from torchmae.training.ranks import ALONE, Ranks
from torchmae.training.runtime import Runtime

Inputs = tuple[Any, ...]
"""Arguments of a forward pass: images (B, C, *size), then masks or labels; each has the method `tensor_split`."""


@dataclass(frozen=True)
class LoopSettings:
    """Settings of the training loop; names and ranges as in `PretrainConfig`.

    With `per_epoch`, the log has a line for each epoch (mean loss over images, learning rate, seconds) and none for
    steps; else an epoch's loss is the mean over its steps. `optim` gives the schedule and the clipping of gradients.
    """

    seed: int
    accumulate: int
    optim: OptimConfig
    compile: bool
    checkpoint_minutes: float
    log_every: int = 10
    max_skipped: int = 3
    per_epoch: bool = False


_DRAWING = threading.RLock()


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seeds torch's generators of the processor, whose state is restored at the end, and of `device`.

    All threads of a process share them: a second thread that enters here waits.
    """
    with _DRAWING:
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 2 ms if there is no GPU
        if device is not None and device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)
        try:
            yield
        finally:
            torch.default_generator.set_state(before)


def step_seed(seed: int, step: int, ranks: Ranks = ALONE) -> int:
    """The seed of a rank at a step, independent of earlier steps."""
    return seed % 2**32 * 2**31 + step * ranks.world_size + ranks.rank


class Fixes(NamedTuple):
    """Templates of the fixes in error messages, with {folder}, {accumulate} and {batch_size} (half the current one)."""

    interrupted: str
    diverged: str
    out_of_memory: str
    out_of_memory_alone: str  # micro-batches are single images already


class Task(Protocol):
    """A model with its optimisers, inputs and losses."""

    model: nn.Module  # is saved and restored
    forward: nn.Module  # is called in training: `model` or a part of it, compiled, wrapped for several ranks
    optimizers: Sequence[Optimizer]  # each parameter group has "peak_lr"
    names: tuple[str, ...]  # of the logged losses; the first is logged as "loss"
    runtime: Runtime
    loop: LoopSettings
    fixes: Fixes

    def inputs(self, batch: Batch, step: int, total: int) -> Inputs:
        """Arguments of the forward pass for this rank's part of a batch; `step` is 0 to total - 1.

        torch's generator is seeded by the step. The part is empty if a batch has fewer images than there are ranks.
        """

    def stand_in(self, inputs: Inputs) -> Inputs:
        """Inputs of one blank image for a rank without images; the loss counts them with weight 0."""

    def weight(self, inputs: Inputs) -> int:
        """Number of values in the mean of `losses`; weights the losses of micro-batches and ranks."""

    def losses(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Scalars, float32: the loss to minimise, then each loss in `names`, without gradient."""

    def after_step(self) -> None:
        """Called after each optimiser step."""
        return
