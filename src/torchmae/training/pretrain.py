"""The pre-training loop: batches, masks, steps, figures, checkpoints."""

from __future__ import annotations

import copy
import math
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchmae.config import MaskConfig, PretrainConfig
from torchmae.data.loader import Batch, ImageLoader
from torchmae.data.plan import Plan
from torchmae.errors import CheckpointError, Interrupted, TrainingError
from torchmae.nn.autoencoder import Autoencoder
from torchmae.nn.masking import Mask
from torchmae.random import Purpose, uniform
from torchmae.training.checkpoint import Checkpoint, save_checkpoint
from torchmae.training.optim import build_optimizers, gradient_norm, lr_factor, set_lr
from torchmae.training.progress import Display, Status
from torchmae.training.run_folder import RunFolder
from torchmae.training.runtime import Runtime
from torchmae.training.tracking import Tracker
from torchmae.training.update_size import copy_matrices, update_to_weight

PROBE_STEPS = 10
PROBE_SHARE = 0.02  # of max_minutes, at least, is spent on measuring the speed


@dataclass(frozen=True)
class Evaluator:
    """Something to measure on the way.

    Attributes:
        count: how many times in a run, evenly spread, the last after the last step.
        run: called with the number of steps done; its figures are logged.
    """

    count: int
    run: Callable[[int], dict[str, float]]


@dataclass
class State:
    """Where a run stands; stored in every checkpoint.

    Attributes:
        step: optimiser steps done.
        total_steps: steps of the whole run, which fixes the schedule.
        seconds: time spent training, evaluation and saving apart.
        epoch_loss: sum of the losses of the current epoch's steps.
        precision: "bf16" or "fp32", kept by a resumed run.
        data: fingerprint of the training data.
    """

    step: int
    total_steps: int
    seconds: float
    epoch_loss: float
    precision: str
    data: str


def pretrain(
    config: PretrainConfig,
    *,
    model: Autoencoder,
    loader: ImageLoader,
    fingerprint: str,
    runtime: Runtime,
    folder: RunFolder,
    tracker: Tracker,
    display: Display,
    evaluators: Sequence[Evaluator] = (),
    checkpoint: Checkpoint | None = None,
) -> State:
    """Trains `model` to the end of its schedule.

    Order of events within a step: batch, mask, forward and backward, optimiser, log, evaluators, checkpoint. A
    checkpoint therefore stands for everything up to its step, and a resumed run repeats what came after it.

    Args:
        config: what the run is.
        model: on the runtime's device.
        loader: the training images.
        fingerprint: of the training data.
        runtime: where to compute.
        folder: where checkpoints go.
        tracker: takes the figures.
        display: shows progress.
        evaluators: measured on the way and at the end.
        checkpoint: where to go on from; None: from the start.

    Returns:
        The state at the end.

    Raises:
        TrainingError: a loss that is not finite.
        Interrupted: by SIGINT or SIGTERM, after the state was saved.
        CheckpointError: a checkpoint that does not fit the model, or a disk that is full.
    """
    plan = Plan(len(loader), config.batch_size, config.seed)
    optimizers = build_optimizers(model, config.optim, config.batch_size)
    if checkpoint is None:
        total = plan_steps(config, model, loader, plan, runtime, display)
        state = State(0, total, 0.0, 0.0, runtime.precision, fingerprint)
        save(folder, model, optimizers, state)
    else:
        state = restore(checkpoint, model, optimizers, runtime.precision)
    if config.compile:
        model.compile(dynamic=False)  # an epoch's last, smaller batch is a second graph, not a slower one for all
    due = [(frozenset(due_steps(state.total_steps, item.count)), item.run) for item in evaluators]
    model.train()
    saved_at = time.monotonic()
    window = Window(time.perf_counter())
    with stop_signals() as stop:
        for batch in timed(loader.train_batches(plan, state.step, state.total_steps), window):
            set_lr(optimizers, lr_factor(state.step, state.total_steps, config.optim))
            if config.model.drop_path:  # the one thing a model draws itself: from the step, so that a run can go on
                torch.manual_seed(config.seed % 2**32 * 2**31 + state.step)
            mask = draw_mask(model, config.mask, config.seed, batch, runtime.device)
            state.step += 1
            log_due = state.step % config.log_every == 0
            before = copy_matrices(model) if log_due else None
            loss, norm = train_step(model, optimizers, batch.images, mask, config, runtime, measure_norm=log_due)
            window.add(loss, len(batch.images))
            if before is not None and norm is not None:
                window.figures = {"grad_norm": norm, "update_to_weight": update_to_weight(before, model)}

            epoch_ends = state.step % plan.steps_per_epoch == 0
            evaluations = [run for steps, run in due if state.step in steps]
            if log_due or epoch_ends or evaluations:
                close_window(window, state, plan, optimizers, tracker, display, folder)
            if epoch_ends:
                end_epoch(state, plan, tracker, display)
            if evaluations:
                evaluate(evaluations, state, plan, tracker)
                model.train()
            last = state.step == state.total_steps
            stopped_by = stop.number  # read once: a signal may come at any moment from here on
            if last or stopped_by is not None or time.monotonic() - saved_at > config.checkpoint_minutes * 60:
                close_window(window, state, plan, optimizers, tracker, display, folder)
                save(folder, model, optimizers, state)
                saved_at = time.monotonic()
            if stopped_by is not None and not last:
                raise interrupted(stopped_by, state, folder)
            window.restart()
    return state


def train_step(
    model: Autoencoder,
    optimizers: Sequence[Optimizer],
    images: Tensor,
    mask: Any,
    config: PretrainConfig,
    runtime: Runtime,
    *,
    measure_norm: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One optimiser step on one batch, computed in `config.accumulate` parts.

    Each part's loss counts by its share of the predicted values, so the step is the whole batch's, whatever the
    parts.

    Returns:
        The batch's loss, and the norm of its gradients where that was asked for or clipping needs it: scalars on the
        device, detached, not waited for.
    """
    images_parts = images.tensor_split(min(config.accumulate, len(images)))
    mask_parts = split_mask(mask, len(images_parts))
    total = torch.zeros((), device=images.device)
    for part, part_mask in zip(images_parts, mask_parts, strict=True):
        with runtime.autocast():
            loss = model(part, part_mask).loss
        if len(images_parts) > 1:
            loss = loss * (model.num_targets(part_mask) / max(model.num_targets(mask), 1))
        loss.backward()
        total += loss.detach()
    clip = config.optim.clip_grad
    norm = gradient_norm(model, clip) if measure_norm or clip is not None else None
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, norm


def draw_mask(model: Autoencoder, config: MaskConfig, seed: int, batch: Batch, device: torch.device) -> Any:
    """The masks of a batch: a function of the seed, the epoch and each sample's index."""
    count = model.noise_count(config.strategy)
    noise = torch.from_numpy(uniform(seed, batch.epoch, batch.indices, Purpose.MASK, count))
    return model.draw_mask(config.strategy, noise.to(device, non_blocking=True), config.ratio)


def split_mask(mask: Mask | Tensor, parts: int) -> Sequence[Mask | Tensor]:
    """Cuts the mask of a batch into parts, as `Tensor.tensor_split` cuts the batch."""
    if isinstance(mask, Tensor):
        return mask.tensor_split(parts)
    pairs = zip(mask.ids_keep.tensor_split(parts), mask.ids_masked.tensor_split(parts), strict=True)
    return [Mask(*pair) for pair in pairs]


def due_steps(total: int, count: int) -> list[int]:
    """`count` steps evenly spread over 1 .. total, the last of them `total`."""
    return [math.ceil(total * i / count) for i in range(1, count + 1)]


def plan_steps(
    config: PretrainConfig, model: Autoencoder, loader: ImageLoader, plan: Plan, runtime: Runtime, display: Display
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
    config: PretrainConfig, model: Autoencoder, loader: ImageLoader, plan: Plan, runtime: Runtime, at_least: float
) -> float:
    """Mean seconds of a training step, data included, measured on a copy of the model that is thrown away.

    It takes PROBE_STEPS steps and `at_least` so many seconds, after a warm-up.
    """
    copied = copy.deepcopy(model).train()
    if config.compile:
        copied.compile(dynamic=False)
    optimizers = build_optimizers(copied, config.optim, config.batch_size)
    set_lr(optimizers, 0.0)
    warm_up = PROBE_STEPS // 2
    start = time.perf_counter()
    done = 0
    for batch in loader.train_batches(plan, 0, 1_000_000):
        mask = draw_mask(copied, config.mask, config.seed, batch, runtime.device)
        train_step(copied, optimizers, batch.images, mask, config, runtime)[0].item()
        done += 1
        if done == warm_up:
            start = time.perf_counter()
        elapsed = time.perf_counter() - start
        if done >= warm_up + PROBE_STEPS and elapsed >= at_least:
            break
    return elapsed / (done - warm_up)


def restore(checkpoint: Checkpoint, model: nn.Module, optimizers: Sequence[Optimizer], precision: str) -> State:
    """Puts a checkpoint's weights and optimiser state in place; the learning rates stay the configuration's.

    Args:
        checkpoint: where to go on from.
        model: takes the weights.
        optimizers: as `build_optimizers` made them for `model`.
        precision: of the steps to come.

    Returns:
        The state to go on from.

    Raises:
        CheckpointError: it was made by another model or optimiser.
    """
    peaks = [[(group["peak_lr"], group["weight_decay"]) for group in item.param_groups] for item in optimizers]
    try:
        model.load_state_dict(checkpoint.model)
        for optimizer, saved in zip(optimizers, checkpoint.optimizers, strict=True):
            optimizer.load_state_dict(saved)
        state = State(**{**checkpoint.state, "precision": precision})
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{checkpoint.path} does not fit the model: {reason}", "resume with the run's own settings"
        ) from error
    for optimizer, group_peaks in zip(optimizers, peaks, strict=True):
        for group, (lr, decay) in zip(optimizer.param_groups, group_peaks, strict=True):
            group.update(peak_lr=lr, weight_decay=decay)
    return state


def save(folder: RunFolder, model: nn.Module, optimizers: Sequence[Optimizer], state: State) -> None:
    """Saves a checkpoint.

    Raises:
        TrainingError: a weight or a moment of the optimiser is not finite; no such checkpoint is ever written.
        CheckpointError: the disk is full or cannot be written.
    """
    moments = [
        value
        for optimizer in optimizers
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    ]
    largest = torch.nn.utils.get_total_norm([*(p.detach() for p in model.parameters()), *moments], math.inf)
    if not math.isfinite(largest.item()):
        raise diverged(f"the weights are not finite after step {state.step}", folder)
    save_checkpoint(folder.checkpoints, model.state_dict(), [item.state_dict() for item in optimizers], asdict(state))


def interrupted(signal_number: int, state: State, folder: RunFolder) -> Interrupted:
    """The error of a run that was stopped and saved."""
    return Interrupted(
        f"stopped by {signal.Signals(signal_number).name} after step {state.step} of {state.total_steps}, all saved",
        f"go on with: torchmae pretrain --resume {shlex.quote(str(folder.path))}",
        signal_number,
    )


def diverged(problem: str, folder: RunFolder) -> TrainingError:
    """The error of a run whose numbers are no longer finite."""
    return TrainingError(
        f"{problem}; the last good checkpoint was kept",
        f"go on from it with a smaller step: torchmae pretrain --resume {shlex.quote(str(folder.path))} --optim.lr LR "
        "(or --optim.clip_grad 1, or --precision fp32)",
    )


class Window:
    """The steps since the last line of progress. Losses stay on the device until the window closes.

    Args:
        now: the time it begins, from time.perf_counter.
    """

    def __init__(self, now: float) -> None:
        self.losses: list[Tensor] = []
        self.figures: dict[str, Tensor] = {}  # scalars of its last step
        self.images = 0
        self.waiting = 0.0
        self.seconds = 0.0
        self._since = now

    def add(self, loss: Tensor, images: int) -> None:
        """A step is done."""
        self.losses.append(loss)
        self.images += images

    def stop_clock(self) -> None:
        """Adds the time since the last restart; call after the device was waited for."""
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now

    def restart(self) -> None:
        """Training goes on: what was spent since `stop_clock` on evaluation and saving does not count."""
        if not self.losses:
            self._since = time.perf_counter()

    def clear(self) -> None:
        """Begins anew."""
        self.losses, self.images, self.waiting, self.seconds, self.figures = [], 0, 0.0, 0.0, {}


def close_window(
    window: Window,
    state: State,
    plan: Plan,
    optimizers: Sequence[Optimizer],
    tracker: Tracker,
    display: Display,
    folder: RunFolder,
) -> None:
    """Waits for the device, checks the losses, logs the window's figures; without a step in it, does nothing.

    Raises:
        TrainingError: a loss that is not finite, with the step it came from.
    """
    if not window.losses:
        return
    losses = torch.stack(window.losses).tolist()
    window.stop_clock()
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise diverged(f"the loss is {loss} at step {state.step - len(losses) + i + 1}", folder)
    state.seconds += window.seconds
    state.epoch_loss += sum(losses)
    speed = window.images / window.seconds
    mean = sum(losses) / len(losses)
    remaining = (state.total_steps - state.step) * window.seconds / len(losses)
    wait = window.waiting / window.seconds
    epoch, epochs = state.step / plan.steps_per_epoch, state.total_steps / plan.steps_per_epoch
    tracker.log(
        "train",
        state.step,
        {
            "epoch": epoch,
            "loss": mean,
            "lr": optimizers[-1].param_groups[0]["lr"],
            **{name: figure.item() for name, figure in window.figures.items()},
            "images_per_s": speed,
            "data_wait": wait,
            "seconds": state.seconds,
        },
    )
    display.training(Status(state.step, state.total_steps, epoch, epochs, mean, speed, wait, remaining))
    window.clear()


def end_epoch(state: State, plan: Plan, tracker: Tracker, display: Display) -> None:
    """Logs the mean loss of the epoch that has just ended."""
    number = state.step // plan.steps_per_epoch
    mean = state.epoch_loss / plan.steps_per_epoch
    state.epoch_loss = 0.0
    tracker.log("epoch", state.step, {"epoch": number, "loss": mean})
    display.epoch(number, math.ceil(state.total_steps / plan.steps_per_epoch), mean)


def evaluate(
    evaluations: Sequence[Callable[[int], dict[str, float]]], state: State, plan: Plan, tracker: Tracker
) -> None:
    """Runs evaluations and logs their figures together; those that only draw pictures have none."""
    figures = {name: value for run in evaluations for name, value in run(state.step).items()}
    if figures:
        tracker.log("val", state.step, {"epoch": state.step / plan.steps_per_epoch, **figures})


def timed(batches: Iterator[Batch], window: Window) -> Iterator[Batch]:
    """The same batches; the time spent waiting for each is added to the window."""
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        window.waiting += time.perf_counter() - start
        if batch is None:
            return
        yield batch


class Stop:
    """Whether a signal asked for an end.

    Attributes:
        number: the signal, or None.
    """

    number: int | None = None


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM are noted and the current step goes on to its end; a second one ends at once."""
    stop = Stop()

    def note(number: int, _frame: object) -> None:
        stop.number = number
        for name, handler in before.items():
            signal.signal(name, handler)

    try:
        before = {name: signal.signal(name, note) for name in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller's business
        yield stop
        return
    try:
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
