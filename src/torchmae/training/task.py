"""What is trained: the side of training that pre-training and fine-tuning do not share."""

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
"""What a forward pass takes: first the images (B, C, *size), then what belongs to them; each has `tensor_split`."""


@dataclass(frozen=True)
class LoopSettings:
    """How the trainer runs a task; names and ranges as in the settings of a run.

    Attributes:
        optim: the learning rate's schedule and the clipping of gradients.
        per_epoch: the log has a line for each epoch (the mean loss over images, learning rate, seconds) and none for
            steps; else an epoch's loss is the mean over its steps.
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
    """torch draws from `seed` in here, on the processor and on `device`, whatever other threads draw.

    torch has one generator for all threads of a process: another one that comes here waits.
    """
    with _DRAWING:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 2 ms where it finds no GPU to seed
        if device is not None and device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)
        yield


@contextmanager
def callers_state() -> Iterator[None]:
    """Gives torch's random state and number of threads back at the end, to a program that calls torchmae."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        with _DRAWING:
            torch.set_rng_state(state)
            if on_gpu is not None:
                torch.cuda.set_rng_state(on_gpu)


def step_seed(seed: int, step: int, ranks: Ranks = ALONE) -> int:
    """The seed of a rank at a step: what is drawn there does not depend on the steps before."""
    return seed % 2**32 * 2**31 + step * ranks.world_size + ranks.rank


class Fixes(NamedTuple):
    """What a user is told to do; {folder}, {accumulate} and {batch_size} (half of now) are filled in."""

    interrupted: str
    diverged: str
    out_of_memory: str
    out_of_memory_alone: str  # where a batch is cut into single images already


class Task(Protocol):
    """What the trainer trains.

    Attributes:
        model: what is saved and restored.
        forward: what is called in training: `model` or a part of it, compiled, wrapped for several ranks.
        optimizers: of the trained parameters; each group has its "peak_lr".
        names: of the losses that are logged; the first is logged as "loss".
        runtime: where it computes.
        loop: how the trainer runs it.
        fixes: of a run that ended early.
    """

    model: nn.Module
    forward: nn.Module
    optimizers: Sequence[Optimizer]
    names: tuple[str, ...]
    runtime: Runtime
    loop: LoopSettings
    fixes: Fixes

    def inputs(self, batch: Batch, step: int, total: int) -> Inputs:
        """What the forward pass takes, made from this rank's part of a batch; `step` is 0 to total - 1.

        torch's generator is seeded by the step. A batch may be empty: it may have fewer images than there are ranks.
        """

    def stand_in(self, inputs: Inputs) -> Inputs:
        """Inputs of one blank image, for a rank that has none; they weigh nothing."""

    def weight(self, inputs: Inputs) -> int:
        """Number of values that `losses` is a mean over; it weighs the losses of micro-batches and ranks."""

    def losses(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Scalars, float32: the loss that is minimised, then each of `names`, without gradient."""

    def after_step(self) -> None:
        """Called after each step of the optimisers."""
        return
