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
from torchmae.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from torchmae.training.compilation import compile_model, first_shapes_only, plain_at_the_end
from torchmae.training.optim import build_optimizers, gradient_norm, lr_factor, set_lr
from torchmae.training.parallel import (
    check_parallel,
    checkpoint_activations,
    exchanging,
    load_optimizer,
    load_weights,
    local,
    parallelise,
    whole,
)
from torchmae.training.progress import Display, Status
from torchmae.training.progression import check_progression, early_images, mask_ratio
from torchmae.training.ranks import ALONE, Ranks, agree_on_signal, one_line_when_lost, part_of
from torchmae.training.run_folder import RunFolder
from torchmae.training.runtime import Runtime
from torchmae.training.tracking import Tracker
from torchmae.training.update_size import copy_matrices, update_to_weight

PROBE_STEPS = 10
PROBE_SHARE = 0.02  # of max_minutes, at least, is spent on measuring the speed
SMALLEST_LR_SCALE = 1 / 8  # a run that diverges at an eighth of its learning rate has another fault


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
        epoch_skipped: steps of the current epoch that were left out.
        lr_scale: what the learning rate is multiplied by: halved each time the run was rolled back.
    """

    step: int
    total_steps: int
    seconds: float
    epoch_loss: float
    precision: str
    data: str
    epoch_skipped: int = 0
    lr_scale: float = 1.0


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

    Of several ranks, each computes its part of every batch, and all call this with the same model, data and
    configuration; steps, losses and the end are theirs together.

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
        TrainingError: losses or gradients that are not finite, also after the run was rolled back; memory that ran
            out; another rank that is gone.
        Interrupted: by SIGINT or SIGTERM, after the state was saved.
        CheckpointError: a checkpoint that does not fit the model, or a disk that is full.
        ConfigError: settings that several ranks cannot follow.
    """
    ranks = runtime.ranks
    check_parallel(config, ranks.world_size)
    check_progression(config, model)
    plan = Plan(len(loader), config.batch_size, config.seed)
    with one_line_when_lost(ranks), out_of_memory(config, runtime):
        total = 0 if checkpoint else plan_steps(config, model, loader, plan, runtime, display)
    wrapped = prepare(model, config, runtime)
    optimizers = build_optimizers(model, config.optim, config.batch_size)
    if checkpoint is None:
        state = State(0, total, 0.0, 0.0, runtime.precision, fingerprint)
        save(folder, model, optimizers, state, ranks)
    else:
        state = restore(checkpoint, model, optimizers, runtime.precision)
        state.data = fingerprint
    due = [(frozenset(due_steps(state.total_steps, item.count)), item.run) for item in evaluators]
    model.train()
    saved_at = time.monotonic()
    window = Window(time.perf_counter())

    def settle() -> bool:
        """Closes the window; whether too many of its steps were skipped, and the run was rolled back."""
        close_window(window, state, plan, optimizers, tracker, display)
        if window.skipped_in_row < config.max_skipped:
            return False
        roll_back(state, model, optimizers, folder, window, display, ranks)
        return True

    with (
        one_line_when_lost(ranks),
        stop_signals() as stop,
        out_of_memory(config, runtime),
        plain_at_the_end(model),
        first_shapes_only(config.compile) as compiled,
    ):
        for batch in batches_to_come(loader, plan, state, ranks, window):
            set_lr(optimizers, lr_factor(state.step, state.total_steps, config.optim) * state.lr_scale)
            if config.model.drop_path:  # the one thing a model draws itself: from the step, so that a run can go on
                draw = state.step * ranks.world_size + ranks.rank
                torch.manual_seed(config.seed % 2**32 * 2**31 + draw)
            images = early_images(batch.images, model, config, state.step, state.total_steps)
            ratio = mask_ratio(config.mask, state.step, state.total_steps)
            mask = draw_mask(model, config.mask, config.seed, batch, runtime.device, ratio, images.shape[2:])
            num_images = len(plan.indices(state.step)[1])
            state.step += 1
            log_due = state.step % config.log_every == 0
            before = copy_matrices(model) if log_due else None
            loss, norm = train_step(
                *(model, optimizers, images, mask, config, runtime),
                wrapped=wrapped,
                parts=part_of(num_images, ranks, config.accumulate),
            )
            compiled()
            window.add(loss, norm, num_images)
            if before is not None:
                window.figures = {"grad_norm": norm, "update_to_weight": update_to_weight(before, model)}

            epoch_ends = state.step % plan.steps_per_epoch == 0
            evaluations = [run for steps, run in due if state.step in steps]
            if (log_due or epoch_ends or evaluations) and settle():
                continue
            if epoch_ends:
                end_epoch(state, plan, tracker, display)
            if evaluations:
                evaluate(evaluations, state, plan, tracker)
                model.train()
            last = state.step == state.total_steps
            # Read once: a signal may come at any moment from here on. And agreed: all ranks stop at the same step.
            save_due = time.monotonic() - saved_at > config.checkpoint_minutes * 60
            stopped_by, (save_due,) = agree_on_signal(ranks, stop.number, save_due)
            if last or save_due or stopped_by is not None:
                if settle():
                    continue
                save(folder, model, optimizers, state, ranks)
                saved_at = time.monotonic()
            if stopped_by is not None and not last:
                raise interrupted(stopped_by, state, folder)
            window.restart()
    return state


def prepare(model: Autoencoder, config: PretrainConfig, runtime: Runtime) -> nn.Module:
    """What the loop calls in place of the model: saving activations, compiled, spread over ranks, in this order."""
    if config.checkpoint_activations:
        checkpoint_activations(model)
    if config.compile:
        by_block = config.parallel == "fsdp" and runtime.ranks.world_size > 1
        compile_model(model, runtime.device, budget=config.activation_memory_budget, by_block=by_block)
    return parallelise(model, config, runtime)


def batches_to_come(loader: ImageLoader, plan: Plan, state: State, ranks: Ranks, window: Window) -> Iterator[Batch]:
    """This rank's part of the batches from `state.step` on; begins anew where the step has been set back."""
    while state.step < state.total_steps:
        due = state.step
        parts = loader.train_batches(plan, due, state.total_steps, rank=ranks.rank, world_size=ranks.world_size)
        for batch in timed(parts, window):
            yield batch
            due += 1
            if state.step != due:
                break


def train_step(
    model: Autoencoder,
    optimizers: Sequence[Optimizer],
    images: Tensor,
    mask: Any,
    config: PretrainConfig,
    runtime: Runtime,
    *,
    wrapped: nn.Module | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimiser step on one batch: this rank's images of it, computed in parts.

    The loss of each part on each rank counts by its share of the values predicted on all, so the step is the whole
    batch's, whatever ranks and parts. Where the loss or a gradient is not finite, nothing is changed.

    Args:
        model: the model.
        optimizers: of its parameters.
        images: (B, C, *size); none, where a batch has fewer images than there are ranks.
        mask: for each of them.
        config: accumulation and clipping.
        runtime: where to compute.
        wrapped: what to call in its place, as `prepare` gives it; None: the model.
        parts: how many, the same on all ranks; None: config.accumulate.

    Returns:
        The batch's loss and the norm of its gradients before clipping: scalars on the device, the same on all ranks,
        not waited for.
    """
    forward = model if wrapped is None else wrapped
    world_size = runtime.ranks.world_size
    counts = bool(len(images))
    if not counts:  # a stand-in takes part in the exchange of gradients, and weighs nothing
        images, mask = images.new_zeros(1, *images.shape[1:]), stand_in_mask(model, config.mask, images.device)
    targets = model.num_targets(mask) * counts
    all_targets: int | Tensor = max(targets, 1)
    if world_size > 1:
        tensor = torch.full((), targets, dtype=torch.float64, device=images.device)
        all_targets = runtime.ranks.sum(tensor).clamp(min=1)
    images_parts = images.tensor_split(min(parts or config.accumulate, len(images)))
    mask_parts = split_mask(mask, len(images_parts))
    total = torch.zeros((), device=images.device)
    for i, (part, part_mask) in enumerate(zip(images_parts, mask_parts, strict=True)):
        with exchanging(forward, i == len(images_parts) - 1):
            with runtime.autocast():
                loss = forward(part, part_mask).loss
            if len(images_parts) > 1 or world_size > 1:
                loss = loss * (model.num_targets(part_mask) * counts / all_targets)
            (loss * world_size).backward()  # of which the exchange takes the mean over ranks
            total += loss.detach()
    runtime.ranks.sum(total)
    norm = whole(gradient_norm(model))
    if config.optim.clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.optim.clip_grad, norm)
    step_if_finite(optimizers, total, norm)
    return total, norm


def step_if_finite(optimizers: Sequence[Optimizer], loss: Tensor, norm: Tensor) -> None:
    """Takes the step and clears the gradients; leaves weights and moments alone where the loss or norm is not finite.

    A GPU is not waited for where the optimisers can decide there themselves, as they do for `torch.amp.GradScaler`.
    """
    skip = ~(loss.isfinite() & norm.isfinite())
    on_device = skip.device.type == "cuda" and all(
        getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in optimizers
    )
    take = on_device or not skip.item()
    for optimizer in optimizers:
        if on_device:
            optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        if take:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def stand_in_mask(model: Autoencoder, config: MaskConfig, device: torch.device) -> Any:
    """Some mask of one image."""
    noise = torch.zeros(1, model.noise_count(config.strategy), device=device)
    return model.draw_mask(config.strategy, noise, config.ratio)


def draw_mask(
    model: Autoencoder,
    config: MaskConfig,
    seed: int,
    batch: Batch,
    device: torch.device,
    ratio: float | None = None,
    size: Sequence[int] | None = None,
) -> Any:
    """The masks of a batch: a function of the seed, the epoch and each sample's index.

    `ratio` and `size` replace the configuration's and the model's.
    """
    count = model.noise_count(config.strategy, size)
    noise = torch.from_numpy(uniform(seed, batch.epoch, batch.indices, Purpose.MASK, count))
    return model.draw_mask(config.strategy, noise.to(device, non_blocking=True), ratio or config.ratio, size)


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
    ranks = runtime.ranks
    wrapped = prepare(copied, config, runtime)
    optimizers = build_optimizers(copied, config.optim, config.batch_size)
    set_lr(optimizers, 0.0)
    warm_up = PROBE_STEPS // 2
    start = time.perf_counter()
    done = 0
    for batch in loader.train_batches(plan, 0, 1_000_000, rank=ranks.rank, world_size=ranks.world_size):
        mask = draw_mask(copied, config.mask, config.seed, batch, runtime.device)
        parts = part_of(len(plan.indices(done)[1]), ranks, config.accumulate)
        train_step(copied, optimizers, batch.images, mask, config, runtime, wrapped=wrapped, parts=parts)[0].item()
        done += 1
        if done == warm_up:
            start = time.perf_counter()
        (elapsed,) = ranks.largest(time.perf_counter() - start)
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
    difference = differs(checkpoint.model, model.state_dict())
    if difference:
        raise CheckpointError(
            f"{checkpoint.path} does not fit the model: {difference}", "resume with the run's own settings"
        )
    try:
        load_weights(model, checkpoint.model)
        for optimizer, saved in zip(optimizers, checkpoint.optimizers, strict=True):
            load_optimizer(optimizer, saved)
        state = State(**{**checkpoint.state, "precision": precision})
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{checkpoint.path} does not fit the model: {reason}", "resume with the run's own settings"
        ) from error
    for optimizer, group_peaks in zip(optimizers, peaks, strict=True):
        for group, (lr, decay) in zip(optimizer.param_groups, group_peaks, strict=True):
            group.update(peak_lr=lr, weight_decay=decay)
    return state


def differs(saved: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """In what the weights of a checkpoint and of a model differ, the first of them by name; empty where they fit."""
    found = []
    for name in [*own, *(name for name in saved if name not in own)]:
        there, here = (tuple(side[name].shape) if name in side else None for side in (saved, own))
        if there != here:
            found.append(f"{name} is {there or 'missing'} in the checkpoint and {here or 'missing'} in the model")
    return "" if not found else found[0] + (f", and {len(found) - 1} more differ" if len(found) > 1 else "")


def roll_back(
    state: State,
    model: Autoencoder,
    optimizers: Sequence[Optimizer],
    folder: RunFolder,
    window: Window,
    display: Display,
    ranks: Ranks,
) -> None:
    """Goes back to the newest checkpoint, in place, at half the learning rate.

    Raises:
        TrainingError: that has been done too often.
    """
    problem = f"{window.skipped_in_row} steps in a row up to {state.step} have no finite loss or gradient"
    checkpoint = load_checkpoint(folder.checkpoints)
    scale = state.lr_scale / 2
    if checkpoint is None or scale < SMALLEST_LR_SCALE:
        raise diverged(problem, folder)
    restored = restore(checkpoint, model, optimizers, state.precision)
    vars(state).update(vars(restored), lr_scale=scale)
    if ranks.is_main:
        folder.rewind_metrics(state.step)
    window.skipped_in_row = 0
    window.restart()
    display.warn(
        f"{problem}: back to the checkpoint of step {state.step}, from there at {scale:g} times the learning rate"
    )


def save(
    folder: RunFolder, model: nn.Module, optimizers: Sequence[Optimizer], state: State, ranks: Ranks = ALONE
) -> None:
    """Saves a checkpoint; every rank calls it.

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
    numbers = [local(value.detach()) for value in (*model.parameters(), *moments)]
    largest = torch.nn.utils.get_total_norm([value for value in numbers if value.numel()], math.inf).item()
    if ranks.largest(float(not math.isfinite(largest)))[0]:
        raise diverged(f"the weights are not finite after step {state.step}", folder)
    optimizer_states = [item.state_dict() for item in optimizers]
    save_checkpoint(folder.checkpoints, model.state_dict(), optimizer_states, asdict(state), ranks)


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


@contextmanager
def out_of_memory(config: PretrainConfig, runtime: Runtime) -> Iterator[None]:
    """Memory that ran out as one line with a way on; other errors as they are."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "can't allocate memory" not in str(error):  # a processor's
            raise
        share = -(-config.batch_size // runtime.ranks.world_size)
        parts = min(2 * config.accumulate, share)
        smaller = f"resume with --accumulate {parts} (the same steps in less memory)"
        if parts == config.accumulate:
            smaller = "resume with --checkpoint_activations true, or choose a smaller model"
        raise TrainingError(
            f"out of memory on {runtime.device}: {share} images a step in parts of {-(-share // config.accumulate)}",
            f"{smaller}, or start again with --batch_size {max(config.batch_size // 2, 1)}",
        ) from error


class Window:
    """The steps since the last line of progress. Losses stay on the device until the window closes.

    Args:
        now: the time it begins, from time.perf_counter.
    """

    def __init__(self, now: float) -> None:
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.skipped_in_row = 0  # up to its last step
        self.figures: dict[str, Tensor] = {}  # scalars of its last step
        self.images = 0
        self.waiting = 0.0
        self.seconds = 0.0
        self._since = now

    def add(self, loss: Tensor, norm: Tensor, images: int) -> None:
        """A step is done, or was skipped where its loss or its gradient's norm is not finite."""
        self.losses.append(loss)
        self.norms.append(norm)
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
        self.losses, self.norms, self.images, self.waiting, self.seconds, self.figures = [], [], 0, 0.0, 0.0, {}


def close_window(
    window: Window,
    state: State,
    plan: Plan,
    optimizers: Sequence[Optimizer],
    tracker: Tracker,
    display: Display,
) -> None:
    """Waits for the device, says which steps were skipped, logs the window's figures; without a step in it, does
    nothing."""
    if not window.losses:
        return
    pairs = torch.stack([torch.stack(window.losses), torch.stack(window.norms)]).T.tolist()
    window.stop_clock()
    losses = []
    for i, (loss, norm) in enumerate(pairs):
        if math.isfinite(loss) and math.isfinite(norm):
            losses.append(loss)
            window.skipped_in_row = 0
        else:
            window.skipped_in_row += 1
            step = state.step - len(pairs) + i + 1
            display.warn(f"step {step} skipped: the loss is {loss:.4g} and the gradient's norm {norm:.4g}")
    skipped = len(pairs) - len(losses)
    state.seconds += window.seconds
    state.epoch_loss += sum(losses)
    state.epoch_skipped += skipped
    speed = window.images / window.seconds
    mean = sum(losses) / len(losses) if losses else math.nan
    remaining = (state.total_steps - state.step) * window.seconds / len(pairs)
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
            **({"skipped": skipped} if skipped else {}),
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
    steps = plan.steps_per_epoch - state.epoch_skipped
    mean = state.epoch_loss / steps if steps else math.nan
    state.epoch_loss, state.epoch_skipped = 0.0, 0
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
