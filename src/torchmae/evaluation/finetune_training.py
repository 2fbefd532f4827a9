"""The training of a classifier: layers with learning rates of their own, steps on augmented batches, checkpoints."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchmae.config import OptimConfig
from torchmae.config.finetune import FinetuneConfig
from torchmae.data.loader import ImageLoader, Plan
from torchmae.data.worker import Indices
from torchmae.errors import CheckpointError, ConfigError, DataError, Interrupted, TrainingError, reason_of
from torchmae.evaluation.augment import Augment
from torchmae.nn.classifier import Classifier
from torchmae.nn.mae import no_weight_decay
from torchmae.training.checkpoint import Checkpoint, save_checkpoint
from torchmae.training.compilation import compile_model, first_shapes_only, plain_at_the_end
from torchmae.training.optim import lr_factor, set_lr
from torchmae.training.parallel import average_gradients, exchanging
from torchmae.training.pretrain import due_steps
from torchmae.training.progress import Display, Status
from torchmae.training.ranks import ALONE, Ranks, agree_on_signal, part_of
from torchmae.training.run_folder import RunFolder
from torchmae.training.runtime import Runtime
from torchmae.training.signals import stop_signals
from torchmae.training.state import all_finite
from torchmae.training.tracking import Tracker
from torchmae.training.window import Window, timed

LOG_EVERY = 10


@dataclass(frozen=True)
class Job:
    """What a fine-tuning is; one that goes on must be the same.

    Attributes:
        settings: the FinetuneConfig.
        labels_per_class: images of each class; None: all.
        draw: which draw of them.
        seed: of everything random.
        data: fingerprint of the training images.
    """

    settings: dict[str, Any]
    labels_per_class: int | None
    draw: int
    seed: int
    data: str

    def step_seed(self, step: int, ranks: Ranks = ALONE) -> int:
        """What a rank seeds torch's generator with at a step, where augmentation and drop-path draw from it."""
        return self.seed % 2**32 * 2**31 + step * ranks.world_size + ranks.rank


@dataclass(frozen=True)
class SubsetPlan(Plan):
    """The order of a training on some of a loader's images.

    Attributes:
        rows: (num_samples,) which images of the loader these are.
    """

    rows: Indices = field(kw_only=True, compare=False)

    def indices(self, step: int) -> tuple[int, Indices]:
        """The epoch of a step and the loader's images in its batch."""
        epoch, chosen = super().indices(step)
        return epoch, self.rows[chosen]


def layer_index(name: str, depth: int) -> int:
    """The layer a parameter belongs to: 0 for the embedding, 1 to `depth` for the blocks, depth + 1 for the rest."""
    if name.startswith(("cls_token", "patch_embed.")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def parameter_groups(model: Classifier, *, lr: float, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of every layer with a learning rate of its own (Clark et al. 2020, ELECTRA).

    Args:
        model: the classifier.
        lr: of the head; that of each layer below is `layer_decay` times the one above it.
        layer_decay: above 0, at most 1.
        weight_decay: not applied to biases, norms and the class token.

    Returns:
        Groups for an optimiser, each with its "lr" also as "peak_lr", from the bottom up.
    """
    depth = len(model.blocks)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        layer, plain = layer_index(name, depth), no_weight_decay(name, parameter)
        rate = lr * layer_decay ** (depth + 1 - layer)
        decay = 0.0 if plain else weight_decay
        group = {"params": [], "lr": rate, "peak_lr": rate, "weight_decay": decay}
        groups.setdefault((layer, plain), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


class Learner(nn.Module):
    """A classifier, the moving average of its weights if there is one, and its optimiser.

    Args:
        classifier: on the device it is trained on.
        config: of the optimiser and the average.
        batch_size: images per step, which scales the learning rate.
    """

    def __init__(self, classifier: Classifier, config: FinetuneConfig, batch_size: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.average: AveragedModel | None = None
        if config.ema is not None:
            self.average = AveragedModel(classifier, multi_avg_fn=get_ema_multi_avg_fn(config.ema))  # type: ignore[no-untyped-call]
        groups = parameter_groups(
            classifier,
            lr=config.base_lr * batch_size / 256,
            layer_decay=config.layer_decay,
            weight_decay=config.weight_decay,
        )
        fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
        self.optimizer = AdamW(groups, betas=config.betas, fused=fused)

    @property
    def result(self) -> Classifier:
        """What is measured and saved."""
        module: nn.Module = self.classifier if self.average is None else self.average.module
        assert isinstance(module, Classifier)
        return module

    def step(
        self,
        images: Tensor,
        targets: Tensor,
        config: FinetuneConfig,
        runtime: Runtime,
        *,
        wrapped: nn.Module | None = None,
        num_images: int | None = None,
    ) -> Tensor:
        """One optimiser step on one batch, computed in `config.accumulate` parts.

        Args:
            images: (B, C, *size), this rank's of the batch.
            targets: (B,) labels, or (B, num_classes) shares that sum to 1.
            config: of the loss.
            runtime: where to compute.
            wrapped: what to call in place of the classifier, of several ranks.
            num_images: of the batch on all ranks; None: B.

        Returns:
            The batch's loss: a scalar on the device, detached, the same on all ranks.
        """
        ranks, forward = runtime.ranks, self.classifier if wrapped is None else wrapped
        whole = num_images or len(images)
        counts = bool(len(images))
        if not counts:  # a stand-in takes part in the exchange of gradients, and weighs nothing
            images, targets = images.new_zeros(1, *images.shape[1:]), targets.new_zeros(1, *targets.shape[1:])
        parts = part_of(whole, ranks, config.accumulate)
        total = torch.zeros((), device=images.device)
        pairs = zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True)
        for i, (part, target) in enumerate(pairs):
            with exchanging(forward, i == parts - 1):
                with runtime.autocast():
                    logits = forward(part)
                loss = F.cross_entropy(logits.float(), target, label_smoothing=config.label_smoothing)
                loss = loss * (len(part) * counts / whole)
                torch.autograd.backward(loss * ranks.world_size)  # of which the exchange takes the mean over ranks
                total += loss.detach()
        ranks.sum(total)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.classifier)
        return total


@dataclass
class State:
    """Where a fine-tuning stands; stored in every checkpoint.

    Attributes:
        step: optimiser steps done.
        total_steps: steps of the whole training.
        seconds: time spent training, evaluation and saving apart.
        epoch_loss: sum of the losses of the current epoch's images.
        loss: mean of the last whole epoch.
        job: what the training is.
    """

    step: int
    total_steps: int
    seconds: float
    epoch_loss: float
    loss: float
    job: dict[str, Any]


def fit(
    learner: Learner,
    loader: ImageLoader,
    plan: SubsetPlan,
    augment: Augment,
    config: FinetuneConfig,
    state: State,
    measure: Callable[[], dict[str, float]],
    runtime: Runtime,
    folder: RunFolder,
    tracker: Tracker,
    display: Display,
) -> None:
    """Trains to the end of the schedule; `learner` and `state` are changed in place.

    Args:
        learner: what is trained.
        loader: the training images.
        plan: which of them make up which step.
        augment: of each batch.
        config: how to train.
        state: where training stands.
        measure: called between epochs where `config.evaluations` asks for it; what it returns is logged.
        runtime: where to compute.
        folder: where checkpoints go.
        tracker: takes the figures.
        display: shows progress.

    Raises:
        TrainingError: a loss that is not finite.
        Interrupted: by SIGINT or SIGTERM, after the state was saved.
        CheckpointError: a disk that is full.
    """
    job, ranks = Job(**state.job), runtime.ranks
    if config.compile:
        compile_model(learner.classifier, runtime.device)
    wrapped = average_gradients(learner.classifier, runtime, config.accumulate) if ranks.world_size > 1 else None
    schedule = OptimConfig(warmup=config.warmup, min_lr=config.min_lr)
    due = {math.ceil(step / plan.steps_per_epoch) for step in due_steps(state.total_steps, config.evaluations)[:-1]}
    learner.train()
    saved_at = time.monotonic()
    window = Window(time.perf_counter())
    with (
        stop_signals() as stop,
        plain_at_the_end(learner.classifier),
        first_shapes_only(config.compile) as compiled,
    ):
        parts = loader.train_batches(plan, state.step, state.total_steps, rank=ranks.rank, world_size=ranks.world_size)
        for batch in timed(parts, window):
            set_lr([learner.optimizer], lr_factor(state.step, state.total_steps, schedule))
            # Augmentation and drop-path draw from torch's generator: seeded by the step, a run can go on from any.
            torch.manual_seed(job.step_seed(state.step, ranks))
            num_images = len(plan.indices(state.step)[1])
            images, targets = batch.images, batch.labels
            if len(images):  # a batch may have fewer images than there are ranks
                images, targets = augment(images, targets)
            loss = learner.step(images, targets, config, runtime, wrapped=wrapped, num_images=num_images)
            compiled()
            window.steps.append(loss)
            window.images += num_images
            state.step += 1

            epoch, position = divmod(state.step, plan.steps_per_epoch)
            last = state.step == state.total_steps
            overdue = time.monotonic() - saved_at > config.checkpoint_minutes * 60
            stopped_by, (save_due,) = agree_on_signal(ranks, stop.number, overdue)
            save_due = save_due or last or stopped_by is not None
            if position == 0 or save_due or state.step % LOG_EVERY == 0:
                close_window(window, state, plan, display)
            if position == 0:
                end_epoch(learner, state, plan, tracker)
                if epoch in due and not last:
                    tracker.log("val", state.step, measure())
                    learner.train()
            if save_due:
                save(folder, learner, state, ranks)
                saved_at = time.monotonic()
            if stopped_by is not None and not last:
                raise Interrupted(
                    f"stopped by {signal.Signals(stopped_by).name} after step {state.step} of {state.total_steps}, "
                    "all saved",
                    "give the same settings with --resume to go on",
                    stopped_by,
                )
            window.restart()


def close_window(window: Window, state: State, plan: SubsetPlan, display: Display) -> None:
    """Waits for the device, checks the losses, shows progress.

    Raises:
        TrainingError: a loss that is not finite, with the step it came from.
    """
    losses = torch.stack(window.steps).tolist()
    window.stop_clock()
    for step, loss in enumerate(losses, start=state.step - len(losses)):
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {step + 1}", "fine-tune with a smaller base_lr")
        state.epoch_loss += loss * len(plan.indices(step)[1])
    state.seconds += window.seconds
    speed = window.images / window.seconds
    epoch, epochs = state.step / plan.steps_per_epoch, state.total_steps / plan.steps_per_epoch
    remaining = (state.total_steps - state.step) * window.seconds / len(losses)
    wait = window.waiting / window.seconds
    mean = sum(losses) / len(losses)
    display.training(Status(state.step, state.total_steps, epoch, epochs, mean, speed, wait, remaining))
    window.clear()


def end_epoch(learner: Learner, state: State, plan: SubsetPlan, tracker: Tracker) -> None:
    """Logs the epoch that has just ended."""
    state.loss = state.epoch_loss / plan.num_samples
    state.epoch_loss = 0.0
    figures = {
        "epoch": state.step / plan.steps_per_epoch,
        "loss": state.loss,
        "lr": learner.optimizer.param_groups[-1]["lr"],
        "seconds": state.seconds,
    }
    tracker.log("epoch", state.step, figures)


def save(folder: RunFolder, learner: Learner, state: State, ranks: Ranks) -> None:
    """Saves a checkpoint; every rank calls it.

    Raises:
        TrainingError: a weight or a moment of the optimiser is not finite; no such checkpoint is ever written.
        CheckpointError: the disk is full or cannot be written.
    """
    if not all_finite(learner, [learner.optimizer], ranks):
        raise TrainingError(
            f"the weights are not finite after step {state.step}; the last good checkpoint was kept",
            "fine-tune with a smaller base_lr",
        )
    save_checkpoint(folder.checkpoints, learner.state_dict(), [learner.optimizer.state_dict()], asdict(state), ranks)


def restore(checkpoint: Checkpoint | None, learner: Learner, job: Job, out: Path) -> State:
    """Puts a checkpoint's weights and optimiser state in place.

    Returns:
        The state to go on from.

    Raises:
        CheckpointError: there is none, or it is of another model.
        ConfigError: it was made with other settings.
        DataError: it was made with other images.
    """
    if checkpoint is None:
        raise CheckpointError(f"{out} holds no fine-tuning to go on with", "start one in a new folder")
    try:
        state = State(**checkpoint.state)
        learner.load_state_dict(checkpoint.model)
        learner.optimizer.load_state_dict(checkpoint.optimizers[0])
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{checkpoint.path} does not fit the model: {reason_of(error)}", "resume with the model it began with"
        ) from error
    check_same(state.job, job, out)
    return state


def check_same(before: dict[str, Any], job: Job, out: Path) -> None:
    """Raises ConfigError or DataError unless a checkpoint's job is the one in hand."""
    now = json.loads(json.dumps(asdict(job)))  # as the checkpoint has it, with lists for tuples
    if now["data"] != before["data"]:
        raise DataError("the training images have changed since the checkpoint", "bring the same images back")
    old, new = ({**item, **item["settings"]} for item in (before, now))
    for name, value in new.items():
        if old.get(name) != value and name not in ("settings", "checkpoint_minutes", "compile"):
            raise ConfigError(
                f"{name} is {value} and was {old.get(name)} in {out}", "resume with the settings it began with"
            )
