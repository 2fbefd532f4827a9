"""Pre-training: a masked autoencoder as a task of the trainer, and steps that measure memory and time beforehand.

This is where `PretrainConfig` ends: the rest of `training` takes what it needs.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmae.config import PretrainConfig
from torchmae.data.loader import Batch, ImageLoader, Plan
from torchmae.errors import ConfigError, TrainingError
from torchmae.nn.mae import MaskedAutoencoder, require_patches
from torchmae.nn.masking import Masker
from torchmae.nn.patches import grid_size
from torchmae.training.checkpoint import Checkpoint
from torchmae.training.compilation import compile_model, first_shapes_only, plain_at_the_end
from torchmae.training.optim import build_optimizers, set_lr
from torchmae.training.parallel import checkpoint_activations, place, wrap_ddp
from torchmae.training.progress import Display
from torchmae.training.ranks import ALONE, one_line_when_lost
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


def check_parallel(config: PretrainConfig, world_size: int) -> None:
    """ConfigError for settings that several processes cannot follow."""
    if world_size == 1 or config.parallel != "fsdp":
        return
    if config.optim.name == "muon":
        raise ConfigError(
            "optim.name is 'muon' and parallel is 'fsdp', but Muon needs whole matrices",
            "use --parallel ddp, or --optim.name adamw",
        )
    if config.compress_gradients:
        raise ConfigError("compress_gradients is for parallel ddp, and parallel is 'fsdp'", "leave it out")


def check_progression(config: PretrainConfig, model: MaskedAutoencoder) -> None:
    """ConfigError for images or masks whose size is to change in a way that model or compilation cannot follow."""
    given = {"start_size": config.start_size, "mask.final_ratio": config.mask.final_ratio}
    changes = [name for name, value in given.items() if value is not None]
    if not changes:
        return
    require_patches(model, f"whose number {changes[0]} could change")
    if config.compile:
        raise ConfigError(f"{changes[0]} changes shapes on the way, and compile is for one", "use --compile false")
    if config.start_size is not None:
        size, full = start_size(config, model), model.encoder.input_size
        if any(small > large for small, large in zip(size, full, strict=True)):
            raise ConfigError(f"start_size is {size}, larger than the input {full}", "make it smaller")
        try:
            grid_size(size, model.patch_size)
        except ConfigError as error:
            raise ConfigError(f"start_size is {size}: {error.problem}", error.fix) from error


def start_size(config: PretrainConfig, model: MaskedAutoencoder) -> tuple[int, ...]:
    """`config.start_size` as one number per axis; ConfigError for another number of axes."""
    axes = len(model.patch_size)
    assert config.start_size is not None
    size = (config.start_size,) * axes if isinstance(config.start_size, int) else tuple(config.start_size)
    if len(size) != axes:
        raise ConfigError(
            f"start_size is {size} but images have {axes} axes", "give one number for each, or one for all"
        )
    return size


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

    def __init__(self, config: PretrainConfig, model: MaskedAutoencoder, runtime: Runtime, batch_size: int) -> None:
        self.model: MaskedAutoencoder = model
        self.runtime = runtime
        self.names = tuple(target.name for target in model.targets)
        schedule, minutes = config.optim, config.checkpoint_minutes
        self.loop = LoopSettings(
            config.seed, config.accumulate, schedule, config.compile, minutes, config.log_every, config.max_skipped
        )
        self._masker = Masker(model.encoder, **asdict(config.mask))
        self._start_size = None if config.start_size is None else start_size(config, model)
        self._start_share = config.start_share
        sharded = config.parallel == "fsdp" and runtime.ranks.world_size > 1
        if config.checkpoint_activations:
            checkpoint_activations(model)
        if config.compile:
            compile_model(model, runtime.device, budget=config.activation_memory_budget, by_block=sharded)
        self.forward: nn.Module = model
        if not sharded:
            self.forward = wrap_ddp(model, runtime, config.accumulate, compress=config.compress_gradients)
        self.optimizers = build_optimizers(model, config.optim, batch_size)

    def inputs(self, batch: Batch, step: int, total: int) -> Inputs:
        """Images and their masks; the first part of a run may have small images (DailyMAE, arXiv 2404.00509)."""
        images, valid = batch.images, batch.valid
        early = self._start_size is not None and step < self._start_share * total
        if early and self._start_size != tuple(images.shape[2:]):
            axes = len(self._start_size or ())
            images = F.interpolate(images, size=self._start_size, mode=_RESAMPLING[axes], antialias=axes == 2)
            if valid is not None:
                valid = F.interpolate(valid.float(), size=self._start_size, mode="area") > 0.5
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
        return output.loss, *output.losses


def pretrain(
    config: PretrainConfig,
    *,
    model: MaskedAutoencoder,
    loader: ImageLoader,
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
    plan = Plan(len(loader), min(config.batch_size, len(loader)), config.seed)
    total = 0 if checkpoint else config.epochs * plan.steps_per_epoch
    if not checkpoint and config.max_minutes is not None:
        budget = config.max_minutes * 60
        seconds = measure_speed(config, model, loader, plan, runtime, at_least=budget * PROBE_SHARE)
        total = max(1, round(budget / seconds))
        display.say(f"{seconds * 1000:.0f} ms a step: {total} steps in {config.max_minutes:g} minutes")
    task = PretrainTask(config, model, runtime, plan.batch_size)
    state = State(0, total, precision=runtime.precision, data=fingerprint)
    return train(task, state, loader=loader, plan=plan, display=display, checkpoint=checkpoint, **others)


@contextmanager
def trial(
    config: PretrainConfig, model: MaskedAutoencoder, runtime: Runtime, batch_size: int
) -> Iterator[tuple[PretrainTask, Callable[[bool], AbstractContextManager[None]]]]:
    """A task whose steps leave the weights as they are, and `first_shapes_only`'s context of each step.

    The learning rate is 0; optimisers, gradients and wrappers are gone afterwards, compiled code stays.
    """
    try:
        with plain_at_the_end(model.train()), first_shapes_only(config.compile, keep=True) as compiled:
            task = PretrainTask(config, model, runtime, batch_size)
            set_lr(task.optimizers, 0.0)
            yield task, compiled
    finally:
        model.zero_grad(set_to_none=True)


def measure_speed(
    config: PretrainConfig, model: MaskedAutoencoder, loader: ImageLoader, plan: Plan, runtime: Runtime, at_least: float
) -> float:
    """Mean seconds of a training step, data included, of PROBE_STEPS steps and `at_least` so many seconds.

    A warm-up goes before. The steps are like those all over the run, whose images and masks may change in size.
    """
    ranks, warm_up, done, start = runtime.ranks, PROBE_STEPS // 2, 0, time.perf_counter()
    with (
        one_line_when_lost(ranks),
        trial(config, model, runtime, plan.batch_size) as (task, compiled),
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
            if done >= warm_up + PROBE_STEPS and elapsed >= at_least:
                break
    return elapsed / (done - warm_up)


def fit_batch(
    config: PretrainConfig, model: MaskedAutoencoder, image_size: tuple[int, ...], limit: int, runtime: Runtime
) -> int:
    """The largest batch, over all ranks, of which each rank's share fits on its GPU in `config.accumulate` parts.

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
        short = not step_fits(config, model, (share, *image_size), runtime)
        return not ranks.all_reduce_max(float(short))[0]

    if not fits(1):
        raise TrainingError("not one image fits in the GPU's memory", "choose a smaller model or --parallel fsdp")
    share = 1
    while 2 * share * ranks.world_size <= limit and fits(2 * share):
        share *= 2
    return share * ranks.world_size


def step_fits(config: PretrainConfig, model: MaskedAutoencoder, shape: tuple[int, ...], runtime: Runtime) -> bool:
    """Whether a step on images of this shape leaves a tenth of the GPU free."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(runtime.device)
    try:
        try_step(config, model, shape, runtime)
        total = torch.cuda.get_device_properties(runtime.device).total_memory
        return torch.cuda.max_memory_reserved(runtime.device) < USABLE * total
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        return False


def try_step(config: PretrainConfig, model: MaskedAutoencoder, shape: tuple[int, ...], runtime: Runtime) -> None:
    """The step of a run that takes the most memory, on images of this shape, with a copy of the model.

    With DDP each rank steps alone: it needs as much memory, and one that runs out does not leave others waiting.
    """
    if config.parallel == "ddp":
        runtime = replace(runtime, ranks=ALONE)
    lowest = replace(config.mask, ratio=min(config.mask.ratio, config.mask.final_ratio or 1), final_ratio=None)
    config = replace(config, start_size=None, mask=lowest)
    copied = copy.deepcopy(model)
    place(copied, config.parallel, runtime)
    indices = np.arange(shape[0])
    try:
        with trial(config, copied, runtime, config.batch_size) as (task, compiled), compiled(True):
            images = torch.zeros(shape, device=runtime.device)
            train_step(task, task.inputs(Batch(images, torch.full(shape[:1], -1), indices, 0), 0, 1))
    finally:
        if config.compile:  # each trial has a shape of its own, and only a few are compiled of one function
            torch.compiler.reset()
