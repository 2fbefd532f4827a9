"""Pre-training: one or two stages of the trainer, and steps that measure memory and time beforehand."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from torchmae.data.loader import Batch, ImageLoader, Plan
from torchmae.errors import ConfigError, TrainingError
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.training.checkpoint import Checkpoint
from torchmae.training.compilation import StepContext, full_batches_only, plain_at_the_end
from torchmae.training.optim import set_lr
from torchmae.training.parallel import place
from torchmae.training.pretrain_task import PretrainSettings, PretrainTask
from torchmae.training.progress import Display
from torchmae.training.ranks import ALONE
from torchmae.training.refine import RefineTask
from torchmae.training.runtime import Runtime
from torchmae.training.state import State
from torchmae.training.trainer import out_of_memory, ran_out_of_memory, train, train_step

PROBE_STEPS = 10
PROBE_SHARE = 0.02  # of max_minutes, at least, is spent on measuring the speed
USABLE = 0.9  # of a GPU's memory: fragmentation grows in a long run, and evaluation takes some
_MANY_STEPS = 1_000_000
Stage = Callable[[PretrainSettings, MaskedAutoencoder, Runtime, int], PretrainTask]
"""Builds the task of one stage; the last argument is the global batch size."""

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, spread evenly however many there are


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
    """Trains `model`, which is placed, for `epochs`, or for `max_minutes`.

    The speed of the first steps sets the number of steps of each stage; the last stage takes what is left of the
    minutes, and corrects its number on the way. A resumed stage keeps the number of its checkpoint.

    `fingerprint` is that of the training data; `others` are folder, tracker and evaluators. Arguments and errors are
    those of `trainer.train`.
    """
    plan = Plan(len(loader), min(batch_size, len(loader)), settings.seed)
    stages = stages_of(settings, loader)
    total = epochs * plan.steps_per_epoch
    refining = round(settings.refine.share * total)
    steps, times = [total - refining, refining][: len(stages)], [1.0] * len(stages)
    for number, (share, stage) in enumerate(stages if max_minutes is not None and not checkpoint else ()):
        budget = share * (max_minutes or 0) * 60
        seconds = measure_speed(settings, model, loader, plan, runtime, at_least=budget * PROBE_SHARE, stage=stage)
        steps[number], times[number] = max(1, round(budget / seconds)), seconds
        what = "steps" if number == 0 else "steps that refine"
        display.say(f"{seconds * 1000:.0f} ms a step: {steps[number]} {what} in {budget / 60:g} minutes")
    first = steps[0] if len(steps) > 1 else None
    state = State(0, sum(steps), first_steps=first, second_step=times[-1] / times[0], precision=runtime.precision)
    state.data = fingerprint
    for number in range(checkpoint.state.get("stage", 0) if checkpoint else 0, len(stages)):
        state.stage = number
        last = number + 1 == len(stages)
        limit = max_minutes * 60 if last and max_minutes is not None and not checkpoint else None
        if number and limit is not None:
            (state.seconds,) = runtime.ranks.all_reduce_max(state.seconds)  # the same deadline for all ranks
            left = (limit - state.seconds) / (state.second_step * state.seconds / state.step)
            state.total_steps = state.step + max(1, round(left))
        task = stages[number][1](settings, model, runtime, plan.batch_size)
        state = train(
            task, state, loader=loader, plan=plan, display=display, checkpoint=checkpoint, limit=limit, **others
        )
        checkpoint = None
    return state


def stages_of(settings: PretrainSettings, loader: ImageLoader | None) -> list[tuple[float, Stage]]:
    """The stages of a run, each with its share of the run; without a loader, for steps on blank images."""
    share = settings.refine.share
    masked: list[tuple[float, Stage]] = [(1 - share, PretrainTask)]
    return [*masked, (share, partial(RefineTask, loader=loader))] if share else masked


@contextmanager
def trial(
    settings: PretrainSettings, model: MaskedAutoencoder, runtime: Runtime, batch_size: int, stage: Stage
) -> Iterator[tuple[PretrainTask, StepContext]]:
    """Yields a stage's task, and the function that gives the context of each of its steps.

    The steps do not change the weights, since the learning rate is 0. Optimisers, gradients and wrappers are gone
    afterwards; compiled code stays.
    """
    try:
        with plain_at_the_end(model.train()), full_batches_only(settings.compile, keep=True) as compiled:
            task = stage(settings, model, runtime, batch_size)
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
    stage: Stage = PretrainTask,
) -> float:
    """Mean seconds of a step of a stage, data included, of PROBE_STEPS steps and `at_least` so many seconds.

    A warm-up goes before. Of the two halves the faster one counts: another program may have had the machine in the
    other. The steps are like those all over the run, whose images and masks may change in size.
    """
    ranks, warm_up, done, start = runtime.ranks, PROBE_STEPS // 2, 0, time.perf_counter()
    ends = [0.0]  # of the steps after the warm-up, in seconds from `start`
    with (
        trial(settings, model, runtime, plan.batch_size, stage) as (task, compiled),
        out_of_memory(task, plan.batch_size),
    ):
        for batch in loader.train_batches(plan, 0, _MANY_STEPS, rank=ranks.rank, world_size=ranks.world_size):
            inputs = task.inputs(batch, int(done * _GOLDEN_RATIO % 1 * _MANY_STEPS), _MANY_STEPS)
            num_images = len(plan.indices(done)[1])
            with compiled(num_images == plan.batch_size, inputs[0].shape[2:]):
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
    """Tries the largest step of each stage in memory, on images of this shape, with a copy of the model.

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
        for _, stage in stages_of(settings, None):
            with trial(settings, copied, runtime, shape[0], stage) as (task, compiled), compiled(True, shape[2:]):
                images = torch.zeros(shape, device=runtime.device)
                train_step(task, task.inputs(Batch(images, torch.full(shape[:1], -1), indices, 0), 0, 1))
    finally:
        if settings.compile:  # each trial has a shape of its own, and only a few are compiled of one function
            torch.compiler.reset()
