"""Pre-training: a masked autoencoder as a task of the trainer, and steps that measure memory and time beforehand."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmae.config import MaskConfig
from torchmae.data.loader import Batch, ImageLoader, Plan
from torchmae.errors import ConfigError, TrainingError
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.training.checkpoint import Checkpoint
from torchmae.training.compilation import compile_model, first_shapes_only, plain_at_the_end
from torchmae.training.optim import build_optimizers, set_lr
from torchmae.training.parallel import checkpoint_activations, place, wrap_ddp
from torchmae.training.progress import Display
from torchmae.training.ranks import ALONE
from torchmae.training.runtime import Runtime
from torchmae.training.state import State
from torchmae.training.task import Fixes, Inputs, LoopSettings, Task
from torchmae.training.trainer import out_of_memory, ran_out_of_memory, train, train_step

PROBE_STEPS = 10
PROBE_SHARE = 0.02  # of max_minutes, at least, is spent on measuring the speed
USABLE = 0.9  # of a GPU's memory: fragmentation grows in a long run, and evaluation takes some
_MANY_STEPS = 1_000_000
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, spread evenly however many there are
_RESAMPLING = {1: "linear", 2: "bicubic", 3: "trilinear"}


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(LoopSettings):
    """How a masked autoencoder is trained: fields of `PretrainConfig`, `start_size` with one number for each axis."""

    mask: MaskConfig
    start_size: tuple[int, ...] | None
    start_share: float
    parallel: str
    compress_gradients: bool
    checkpoint_activations: bool
    activation_memory_budget: float


class PretrainTask(Task):
    """A masked autoencoder that learns to predict what was masked.

    The model, which `place` has put on the runtime's device, is changed in place: activation checkpointing,
    compilation, DDP. `batch_size`, of all ranks together, scales the learning rate.
    """

    fixes = Fixes(
        "go on with: torchmae pretrain --resume {folder}",
        "go on from it with a smaller step: torchmae pretrain --resume {folder} --optim.lr LR "
        "(or --optim.clip_grad 1, or --precision fp32)",
        "resume with --accumulate {accumulate} (the same steps in less memory), or start again with --batch_size "
        "{batch_size}",
        "resume with --checkpoint_activations true, or choose a smaller model, or start again with --batch_size "
        "{batch_size}",
    )

    def __init__(self, loop: PretrainSettings, model: MaskedAutoencoder, runtime: Runtime, batch_size: int) -> None:
        self.model: MaskedAutoencoder = model
        self.runtime = runtime
        self.names = tuple(target.name for target in model.targets)
        self.loop: PretrainSettings = loop
        self._masker = Masker(model.encoder, **asdict(loop.mask))
        sharded = loop.parallel == "fsdp" and runtime.ranks.world_size > 1
        if loop.checkpoint_activations:
            checkpoint_activations(model)
        if loop.compile:
            compile_model(model, runtime.device, budget=loop.activation_memory_budget, by_block=sharded)
        self.forward: nn.Module = model
        if not sharded:
            self.forward = wrap_ddp(model, runtime, loop.accumulate, compress=loop.compress_gradients)
        self.optimizers = build_optimizers(model, loop.optim, batch_size)

    def inputs(self, batch: Batch, step: int, total: int) -> Inputs:
        """Images and their masks; the first part of a run may have small images (DailyMAE, arXiv 2404.00509)."""
        images, valid, size = batch.images, batch.valid, self.loop.start_size
        if size is not None and size != tuple(images.shape[2:]) and step < self.loop.start_share * total:
            images = F.interpolate(images, size=size, mode=_RESAMPLING[len(size)], antialias=len(size) == 2)
            if valid is not None:
                valid = F.interpolate(valid.float(), size=size, mode="area") > 0.5
                images = torch.where(valid, images, 0.0)
        masker = self._masker.at(step, total).for_images(images)
        return images, masker(self.loop.seed, batch.epoch, batch.indices, self.runtime.device, valid)

    def stand_in(self, inputs: Inputs) -> Inputs:
        """As `Task.stand_in`."""
        images = inputs[0].new_zeros(1, *inputs[0].shape[1:])
        return images, self._masker.for_images(images)(self.loop.seed, 0, np.zeros(1, dtype=np.int64), images.device)

    def weight(self, inputs: Inputs) -> int:
        """Number of predicted values that count."""
        return self.model.target.num_values(self.model.predicted(inputs[1]))

    def losses(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The weighted sum of the targets' losses, then each target's."""
        with self.runtime.autocast():
            output = self.forward(*inputs)
        return output.loss, *(loss.detach() for loss in output.losses)


def pretrain(
    settings: PretrainSettings,
    *,
    model: MaskedAutoencoder,
    loader: ImageLoader,
    batch_size: int,
    epochs: int,
    max_minutes: float | None = None,
    fingerprint: str,
    runtime: Runtime,
    display: Display,
    checkpoint: Checkpoint | None = None,
    **others: Any,
) -> State:
    """Trains `model`, which is placed, for `epochs`, or for `max_minutes` at the speed of the first steps.

    `fingerprint` is that of the training data; `others` are folder, tracker and evaluators. Arguments and errors are
    those of `trainer.train`.
    """
    plan = Plan(len(loader), min(batch_size, len(loader)), settings.seed)
    total = 0 if checkpoint else epochs * plan.steps_per_epoch
    if not checkpoint and max_minutes is not None:
        budget = max_minutes * 60
        seconds = measure_speed(settings, model, loader, plan, runtime, at_least=budget * PROBE_SHARE)
        total = max(1, round(budget / seconds))
        display.say(f"{seconds * 1000:.0f} ms a step: {total} steps in {max_minutes:g} minutes")
    task = PretrainTask(settings, model, runtime, plan.batch_size)
    state = State(0, total, precision=runtime.precision, data=fingerprint)
    return train(task, state, loader=loader, plan=plan, display=display, checkpoint=checkpoint, **others)


@contextmanager
def trial(
    settings: PretrainSettings, model: MaskedAutoencoder, runtime: Runtime, batch_size: int
) -> Iterator[tuple[PretrainTask, Callable[[bool], AbstractContextManager[None]]]]:
    """A task whose steps leave the weights as they are, and `first_shapes_only`'s context of each step.

    The learning rate is 0; optimisers, gradients and wrappers are gone afterwards, compiled code stays.
    """
    try:
        with plain_at_the_end(model.train()), first_shapes_only(settings.compile, keep=True) as compiled:
            task = PretrainTask(settings, model, runtime, batch_size)
            set_lr(task.optimizers, 0.0)
            yield task, compiled
    finally:
        model.zero_grad(set_to_none=True)


def measure_speed(
    settings: PretrainSettings,
    model: MaskedAutoencoder,
    loader: ImageLoader,
    plan: Plan,
    runtime: Runtime,
    at_least: float,
) -> float:
    """Mean seconds of a training step, data included, of PROBE_STEPS steps and `at_least` so many seconds.

    A warm-up goes before. Of the two halves the faster one counts: another program may have had the machine in the
    other. The steps are like those all over the run, whose images and masks may change in size.
    """
    ranks, warm_up, done, start = runtime.ranks, PROBE_STEPS // 2, 0, time.perf_counter()
    ends = [0.0]  # of the steps after the warm-up, in seconds from `start`
    with (
        trial(settings, model, runtime, plan.batch_size) as (task, compiled),
        out_of_memory(task, plan.batch_size),
    ):
        for batch in loader.train_batches(plan, 0, _MANY_STEPS, rank=ranks.rank, world_size=ranks.world_size):
            inputs = task.inputs(batch, int(done * _GOLDEN_RATIO % 1 * _MANY_STEPS), _MANY_STEPS)
            num_images = len(plan.indices(done)[1])
            with compiled(num_images == plan.batch_size):
                train_step(task, inputs, num_images).loss.item()
            done += 1
            if done == warm_up:
                start = time.perf_counter()
            (elapsed,) = ranks.all_reduce_max(time.perf_counter() - start)
            if done > warm_up:
                ends.append(elapsed)
            if done >= warm_up + PROBE_STEPS and elapsed >= at_least:
                break
    steps, half = len(ends) - 1, (len(ends) - 1) // 2
    return min(ends[half] / half, (ends[-1] - ends[half]) / (steps - half))


def fit_batch(
    settings: PretrainSettings, model: MaskedAutoencoder, image_size: tuple[int, ...], limit: int, runtime: Runtime
) -> int:
    """The largest batch, over all ranks, of which each rank's share fits on its GPU in `accumulate` parts.

    The share is a power of two, and the batch at most `limit`. Steps are tried on copies of `model`, which is not
    placed yet; `image_size` is channels, then pixels along each axis.

    Raises:
        ConfigError: no GPU.
        TrainingError: not even one image fits.
    """
    if runtime.device.type != "cuda":
        raise ConfigError(
            f"batch_size is 'auto', which measures a GPU's memory, and the device is {runtime.device}",
            "give a number: --batch_size 256",
        )
    ranks = runtime.ranks

    def fits(share: int) -> bool:
        short = not step_fits(settings, model, (share, *image_size), runtime)
        return not ranks.all_reduce_max(float(short))[0]

    if not fits(1):
        raise TrainingError("not one image fits in the GPU's memory", "choose a smaller model or --parallel fsdp")
    share = 1
    while 2 * share * ranks.world_size <= limit and fits(2 * share):
        share *= 2
    return share * ranks.world_size


def step_fits(settings: PretrainSettings, model: MaskedAutoencoder, shape: tuple[int, ...], runtime: Runtime) -> bool:
    """Whether a step on images of this shape leaves a tenth of the GPU free."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(runtime.device)
    try:
        try_step(settings, model, shape, runtime)
        total = torch.cuda.get_device_properties(runtime.device).total_memory
        return torch.cuda.max_memory_reserved(runtime.device) < USABLE * total
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        return False


def try_step(settings: PretrainSettings, model: MaskedAutoencoder, shape: tuple[int, ...], runtime: Runtime) -> None:
    """The step of a run that takes the most memory, on images of this shape, with a copy of the model.

    With DDP each rank steps alone: it needs as much memory, and one that runs out does not leave others waiting.
    """
    if settings.parallel == "ddp":
        runtime = replace(runtime, ranks=ALONE)
    lowest = replace(settings.mask, ratio=min(settings.mask.ratio, settings.mask.final_ratio or 1), final_ratio=None)
    settings = replace(settings, start_size=None, mask=lowest)
    copied = copy.deepcopy(model)
    place(copied, settings.parallel, runtime)
    indices = np.arange(shape[0])
    try:
        with trial(settings, copied, runtime, shape[0]) as (task, compiled), compiled(True):
            images = torch.zeros(shape, device=runtime.device)
            train_step(task, task.inputs(Batch(images, torch.full(shape[:1], -1), indices, 0), 0, 1))
    finally:
        if settings.compile:  # each trial has a shape of its own, and only a few are compiled of one function
            torch.compiler.reset()
