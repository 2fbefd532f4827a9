"""Pre-training: a masked autoencoder as a task of the trainer."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor, nn

from torchmae.config import PretrainConfig
from torchmae.data.loader import Batch, ImageLoader, Plan
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.training.checkpoint import Checkpoint
from torchmae.training.compilation import compile_model, first_shapes_only, plain_at_the_end
from torchmae.training.optim import build_optimizers, set_lr
from torchmae.training.parallel import check_parallel, checkpoint_activations, parallelise
from torchmae.training.progress import Display
from torchmae.training.progression import check_progression, early_images
from torchmae.training.ranks import one_line_when_lost, part_of
from torchmae.training.runtime import Runtime
from torchmae.training.state import State
from torchmae.training.task import Fixes, Inputs, LoopSettings, Task
from torchmae.training.trainer import out_of_memory, train, train_step

PROBE_STEPS = 10
PROBE_SHARE = 0.02  # of max_minutes, at least, is spent on measuring the speed
_MANY_STEPS = 1_000_000
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, spread evenly however many there are


class PretrainTask(Task):
    """A masked autoencoder that learns to predict what was masked.

    The model is changed in place, in this order: activations saved, compiled, spread over ranks.

    Args:
        config: how to train.
        model: on the runtime's device.
        runtime: where to compute.
        batch_size: images of a step on all ranks, which scales the learning rate.
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
        self._config = config
        self._masker = Masker(model.encoder, **asdict(config.mask))
        if config.checkpoint_activations:
            checkpoint_activations(model)
        if config.compile:
            by_block = config.parallel == "fsdp" and runtime.ranks.world_size > 1
            compile_model(model, runtime.device, budget=config.activation_memory_budget, by_block=by_block)
        self.forward: nn.Module = parallelise(model, config, runtime)
        self.optimizers = build_optimizers(model, config.optim, batch_size)

    def inputs(self, batch: Batch, step: int, total: int) -> Inputs:
        """Images, small ones early in a run that begins so, and their masks."""
        images = early_images(batch.images, self.model, self._config, step, total)
        masker = self._masker.at(step, total).for_images(images)
        return images, masker(self.loop.seed, batch.epoch, batch.indices, self.runtime.device)

    def stand_in(self, inputs: Inputs) -> Inputs:
        """As `Task.stand_in`."""
        images = inputs[0].new_zeros(1, *inputs[0].shape[1:])
        return images, self._masker.for_images(images)(self.loop.seed, 0, np.zeros(1, dtype=np.int64), images.device)

    def weight(self, inputs: Inputs) -> int:
        """Number of predicted values."""
        return self.model.target.num_values(inputs[1])

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
    """Trains `model` to the end of its schedule.

    Args:
        config: what the run is.
        model: on the runtime's device.
        loader: the training images.
        fingerprint: of the training data.
        runtime: where to compute.
        display: shows progress.
        checkpoint: where to go on from; None: from the start.
        **others: folder, tracker and evaluators, as for `trainer.train`.

    Raises:
        ConfigError: settings that several ranks cannot follow.
        TrainingError, Interrupted, CheckpointError: as `trainer.train`.
    """
    check_parallel(config, runtime.ranks.world_size)
    check_progression(config, model)
    plan = Plan(len(loader), min(config.batch_size, len(loader)), config.seed)
    total = 0 if checkpoint else plan_steps(config, model, loader, plan, runtime, display)
    task = PretrainTask(config, model, runtime, plan.batch_size)
    state = State(0, total, precision=runtime.precision, data=fingerprint)
    return train(task, state, loader=loader, plan=plan, display=display, checkpoint=checkpoint, **others)


def plan_steps(
    config: PretrainConfig,
    model: MaskedAutoencoder,
    loader: ImageLoader,
    plan: Plan,
    runtime: Runtime,
    display: Display,
) -> int:
    """How many steps the run has: from the epochs, or from max_minutes and the speed measured on a copy."""
    if config.max_minutes is None:
        return config.epochs * plan.steps_per_epoch
    budget = config.max_minutes * 60
    seconds = measure_speed(config, model, loader, plan, runtime, at_least=budget * PROBE_SHARE)
    total = max(1, round(budget / seconds))
    display.say(f"{seconds * 1000:.0f} ms a step: {total} steps in {config.max_minutes:g} minutes")
    return total


def measure_speed(
    config: PretrainConfig, model: MaskedAutoencoder, loader: ImageLoader, plan: Plan, runtime: Runtime, at_least: float
) -> float:
    """Mean seconds of a training step, data included, measured on a copy of the model that is thrown away.

    It takes PROBE_STEPS steps and `at_least` so many seconds, after a warm-up.
    """
    copied = copy.deepcopy(model).train()
    ranks = runtime.ranks
    warm_up = PROBE_STEPS // 2
    start = time.perf_counter()
    done = 0
    with (
        one_line_when_lost(ranks),
        plain_at_the_end(copied),  # which also frees it at once: what it calls meanwhile refers to it
        first_shapes_only(config.compile, keep=True) as compiled,
    ):
        task = PretrainTask(config, copied, runtime, plan.batch_size)
        set_lr(task.optimizers, 0.0)
        with out_of_memory(task, plan.batch_size):
            for batch in loader.train_batches(plan, 0, _MANY_STEPS, rank=ranks.rank, world_size=ranks.world_size):
                place = int(done * _GOLDEN_RATIO % 1 * _MANY_STEPS)  # in the run, whose steps may differ in size
                num_images = len(plan.indices(done)[1])
                inputs = task.inputs(batch, place, _MANY_STEPS)
                with compiled(num_images == plan.batch_size):
                    train_step(task, inputs, part_of(num_images, ranks, config.accumulate)).loss.item()
                done += 1
                if done == warm_up:
                    start = time.perf_counter()
                (elapsed,) = ranks.largest(time.perf_counter() - start)
                if done >= warm_up + PROBE_STEPS and elapsed >= at_least:
                    break
    return elapsed / (done - warm_up)
