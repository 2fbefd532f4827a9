"""The training loop: steps over ranks, skipped and rolled-back steps, figures, checkpoints, signals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchmae.data.loader import Batch, ImageLoader, Plan
from torchmae.errors import TrainingError
from torchmae.training.checkpoint import Checkpoint, load_checkpoint
from torchmae.training.compilation import full_batches_only, plain_at_the_end
from torchmae.training.optim import copy_matrices, gradient_norm, lr_factor, set_lr, update_to_weight
from torchmae.training.parallel import exchanging, whole
from torchmae.training.progress import Display
from torchmae.training.ranks import Ranks
from torchmae.training.run_folder import RunFolder
from torchmae.training.signals import stop_signals
from torchmae.training.state import State, diverged, interrupted, restore, save
from torchmae.training.task import Inputs, Task, seeded, step_seed
from torchmae.training.tracking import Tracker
from torchmae.training.window import Step, Window

SMALLEST_LR_SCALE = 1 / 8  # if a run diverges at an eighth of its learning rate, the cause lies elsewhere
_NO_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")  # CUDA and NCCL, a processor, cuBLAS


@dataclass(frozen=True)
class Evaluator:
    """A measurement during training."""

    count: int  # of measurements in a run, evenly spaced, the last one after the last step
    run: Callable[[int], dict[str, float]]  # is called with the number of steps done; its figures are logged
    at_epoch_ends: bool = False  # wait for the end of the epoch

    def due(self, total_steps: int, steps_per_epoch: int) -> frozenset[int]:
        """The numbers of finished steps after which it runs."""
        steps = [math.ceil(total_steps * i / self.count) for i in range(1, self.count + 1)]
        unit = steps_per_epoch if self.at_epoch_ends else 1
        return frozenset(min(-(-step // unit) * unit, total_steps) for step in steps)


@dataclass
class Deadline:
    """Corrects the number of steps of a run so that it ends on time.

    A correction is due when half of the steps, or half of the time, that were left at the last one are used up.
    """

    limit: float  # seconds of training of the whole run
    step: int  # of the last correction
    seconds: float  # of training up to the last correction

    def moves(self, state: State, ranks: Ranks) -> bool:
        """Corrects `state.total_steps` by the clock; False: it is too early. `state.seconds` must be up to date."""
        (seconds,) = ranks.all_reduce_max(state.seconds)
        due = state.step >= (self.step + state.total_steps) / 2 or seconds >= (self.seconds + self.limit) / 2
        if not due or state.step <= self.step:  # a roll-back leads to steps before the last correction
            return False
        pace = (seconds - self.seconds) / (state.step - self.step)
        self.step, self.seconds = state.step, seconds
        state.total_steps = state.step + max(1, round((self.limit - seconds) / pace))
        return True


def train(
    task: Task,
    state: State,
    *,
    loader: ImageLoader,
    plan: Plan,
    folder: RunFolder,
    tracker: Tracker,
    display: Display,
    evaluators: Sequence[Evaluator] = (),
    checkpoint: Checkpoint | None = None,
    limit: float | None = None,
) -> State:
    """Trains a task to the end of its stage and returns the final state.

    `limit`, in seconds of training of the whole run, is for the last stage: its number of steps is corrected on the
    way, so that it ends then.

    Order of events within a step: inputs, forward and backward, optimiser, log, evaluators, checkpoint. A checkpoint
    holds everything up to its step, and a resumed run repeats everything after it.

    All ranks call this with the same arguments; each computes its part of every batch, whose images `plan` chooses.
    `state` is the start of the stage; one resumed from `checkpoint` takes only `data` and `job` from it.

    Raises:
        TrainingError: losses or gradients are not finite, even after roll-backs; memory ran out; another rank ended.
        Interrupted: SIGINT or SIGTERM, after the state was saved.
        CheckpointError: the checkpoint does not fit the model, or the disk is full.
    """
    ranks, loop = task.runtime.ranks, task.loop
    if checkpoint is None:
        save(folder, task, state)
    else:
        restored = restore(checkpoint, task.model, task.optimizers, task.runtime.precision)
        restored.data, restored.job = state.data, state.job
        state = restored
    first, end = state.span
    deadline = None if limit is None else Deadline(limit, state.step, state.seconds)
    due = [sorted(item.due(state.total_steps, plan.steps_per_epoch)) for item in evaluators]
    task.model.train()
    saved_at = time.monotonic()
    window = Window()
    inputs: Inputs = (torch.empty(0),)  # of the newest step

    def settle() -> bool:
        """Closes the window; returns whether too many steps were skipped and the run was rolled back."""
        window.close(state, plan, task, tracker, display)
        if window.longest_skipped < min(loop.max_skipped, state.total_steps):
            return False
        roll_back(state, task, folder, window, display, inputs[0])
        return True

    with (
        stop_signals() as stop,
        out_of_memory(task, plan.batch_size),
        plain_at_the_end(task.model),
        full_batches_only(loop.compile) as compiled,
    ):
        for batch in batches_to_come(loader, plan, state, ranks, window):
            set_lr(task.optimizers, lr_factor(state.step - first, end - first, loop.optim) * state.lr_scale)
            num_images = len(plan.indices(state.step)[1])
            log_due = (state.step + 1) % loop.log_every == 0
            before = copy_matrices(task.model) if log_due and not loop.per_epoch else None
            with seeded(step_seed(loop.seed, state.step, ranks), task.runtime.device):  # drop-path, augmentation
                inputs = task.inputs(batch, state.step - first, end - first)
                with compiled(num_images == plan.batch_size, inputs[0].shape[2:]):
                    step = train_step(task, inputs, num_images)
            state.step += 1
            task.after_step()
            window.add(step, num_images)
            if before is not None:
                window.figures = {"grad_norm": step.norm, "update_to_weight": update_to_weight(before, task.model)}

            epoch_ends = state.step % plan.steps_per_epoch == 0
            evaluations = [item.run for item, steps in zip(evaluators, due, strict=True) if state.step in steps]
            if (log_due or epoch_ends or evaluations) and settle():
                continue
            if deadline is not None and log_due and state.step < end and deadline.moves(state, ranks):
                end = state.total_steps
                planned = [item.due(end, plan.steps_per_epoch) for item in evaluators]
                due = [moved(*steps, state.step) for steps in zip(due, planned, strict=True)]
            if epoch_ends:
                end_epoch(state, plan, task, tracker, display)
            if evaluations:
                evaluate(evaluations, state, plan, task, tracker)
                task.model.train()
            last = state.step == end
            # Read once, since a signal may come at any moment, and shared: all ranks stop at the same step.
            save_due = time.monotonic() - saved_at > loop.checkpoint_minutes * 60
            number, save_agreed = ranks.all_reduce_max(stop.number or 0, save_due)
            stopped_by = int(number) or None
            if last or save_agreed or stopped_by is not None:
                if settle():
                    continue
                save(folder, task, state)
                saved_at = time.monotonic()
            if stopped_by is not None and state.step < state.total_steps:
                raise interrupted(stopped_by, state, task, folder)
            window.restart()
    return state


def moved(former: Sequence[int], planned: frozenset[int], step: int) -> list[int]:
    """The steps after which a measurement runs once the plan changes at `step`: the past ones stay.

    As many planned steps are left out as former ones are done; a planned step that has passed becomes the next step.
    """
    done = [number for number in former if number <= step]
    return done + [max(number, step + 1) for number in sorted(planned)[len(done) :]]


def train_step(task: Task, inputs: Inputs, num_images: int | None = None) -> Step:
    """One optimiser step on this rank's part of a batch, in micro-batches.

    Each micro-batch counts by its share of the weight over all ranks, so ranks and micro-batches do not change the
    step. If the loss or a gradient is not finite, weights stay as they are. A rank may have no images. `num_images`
    counts the images of all ranks; None: `inputs` are the whole batch.
    """
    ranks, images = task.runtime.ranks, inputs[0]
    counts = bool(len(images))
    if not counts:  # a stand-in with weight 0 takes part in the exchange of gradients
        inputs = task.stand_in(inputs)
    weight = task.weight(inputs) * counts
    all_weights: int | Tensor = max(weight, 1)
    if ranks.world_size > 1:
        tensor = torch.full((), weight, dtype=torch.float64, device=images.device)
        all_weights = ranks.sum(tensor).clamp(min=1)
    number = min(micro_batches(num_images or len(images), ranks, task.loop.accumulate), len(inputs[0]))
    total = torch.zeros(1 + len(task.names), device=images.device)
    for i, part in enumerate(zip(*(item.tensor_split(number) for item in inputs), strict=True)):
        with exchanging(task.forward, i == number - 1):
            loss, *logged = task.losses(part)
            share: float | Tensor = ranks.world_size  # since the exchange of gradients takes the mean over ranks
            if number > 1 or ranks.world_size > 1:
                share = share * (task.weight(part) * counts / all_weights)
            (loss * share).backward()  # type: ignore[no-untyped-call]
            total += torch.stack([loss.detach(), *logged]) * (share / ranks.world_size)
    ranks.sum(total)
    norm = whole(gradient_norm(task.model))
    if task.loop.optim.clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(task.model.parameters(), task.loop.optim.clip_grad, norm)
    step_if_finite(task.optimizers, total[0], norm)
    return Step(total[0], norm, total[1:])


def micro_batches(num_images: int, ranks: Ranks, accumulate: int) -> int:
    """Number of micro-batches of a step, the same on all ranks: `accumulate`, or one for each image if fewer."""
    return max(1, min(accumulate, num_images // ranks.world_size))


def step_if_finite(optimizers: Sequence[Optimizer], loss: Tensor, norm: Tensor) -> None:
    """Steps if loss and gradient norm are finite; clears the gradients.

    On a GPU, optimisers that support `torch.amp.GradScaler` decide without waiting for the device.
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


def batches_to_come(loader: ImageLoader, plan: Plan, state: State, ranks: Ranks, window: Window) -> Iterator[Batch]:
    """Yields the batches of a stage from `state.step` on, of each the part that this rank computes.

    After a roll-back they go on from the earlier step; the stage may become longer or shorter on the way.
    """
    while state.step < state.span[1]:
        due = state.step
        parts = loader.train_batches(plan, due, state.span[1], rank=ranks.rank, world_size=ranks.world_size)
        for batch in window.timed(parts):
            yield batch
            due += 1
            if state.step != due or due == state.span[1]:
                break


def roll_back(state: State, task: Task, folder: RunFolder, window: Window, display: Display, images: Tensor) -> None:
    """Returns to the newest checkpoint, in place, at half the learning rate; TrainingError below SMALLEST_LR_SCALE.

    `images` are the inputs of the newest step.
    """
    problem = f"{window.longest_skipped} steps in a row, by step {state.step}, have no finite loss or gradient"
    checkpoint = load_checkpoint(folder.checkpoints, ranks=task.runtime.ranks)
    scale = state.lr_scale / 2
    if checkpoint is None or scale < SMALLEST_LR_SCALE:
        raise diverged(problem, task, folder, images)
    restored = restore(checkpoint, task.model, task.optimizers, state.precision)
    vars(state).update(vars(restored), lr_scale=scale, total_steps=state.total_steps)
    if task.runtime.ranks.is_main:
        folder.rewind_metrics(state.step)
    window.forget_skipped()
    window.restart()
    display.warn(
        f"{problem}: back to the checkpoint of step {state.step}, from there at {scale:g} times the learning rate"
    )


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a GPU or a processor is out of memory; some libraries only say it in words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


@contextmanager
def out_of_memory(task: Task, batch_size: int) -> Iterator[None]:
    """Converts an out-of-memory error into a one-line TrainingError; `batch_size` is of all ranks together."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        ranks = task.runtime.ranks
        share = -(-batch_size // ranks.world_size)
        parts, more = (micro_batches(batch_size, ranks, n * task.loop.accumulate) for n in (1, 2))
        fix = task.fixes.out_of_memory if more > parts else task.fixes.out_of_memory_alone
        raise TrainingError(
            f"out of memory on {task.runtime.device}: {share} images a step in parts of {-(-share // parts)}",
            fix.format(accumulate=more, batch_size=max(batch_size // 2, 1)),
        ) from error


def end_epoch(state: State, plan: Plan, task: Task, tracker: Tracker, display: Display) -> None:
    """Logs the mean loss of the finished epoch."""
    number = state.step // plan.steps_per_epoch
    count = (plan.num_samples if task.loop.per_epoch else plan.steps_per_epoch) - state.epoch_skipped
    state.loss = state.epoch_loss / count if count else math.nan
    state.epoch_loss, state.epoch_skipped = 0.0, 0
    figures = {"epoch": number, "loss": state.loss}
    if task.loop.per_epoch:
        figures |= {"lr": task.optimizers[-1].param_groups[-1]["lr"], "seconds": state.seconds}
    tracker.log("epoch", state.step, figures)
    display.epoch(number, math.ceil(state.total_steps / plan.steps_per_epoch), state.loss)


def evaluate(
    evaluations: Sequence[Callable[[int], dict[str, float]]], state: State, plan: Plan, task: Task, tracker: Tracker
) -> None:
    """Runs evaluations and logs their figures together; an evaluation that draws pictures returns none."""
    figures = {name: value for run in evaluations for name, value in run(state.step).items()}
    if figures:
        epoch = {} if task.loop.per_epoch else {"epoch": state.step / plan.steps_per_epoch}
        tracker.log("val", state.step, epoch | figures)
