"""The pre-training loop: batches, masks, steps, figures, checkpoints."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchmae.config import PretrainConfig
from torchmae.data.loader import Batch, ImageLoader, Plan
from torchmae.errors import TrainingError
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.training.allocation import ran_out_of_memory
from torchmae.training.checkpoint import Checkpoint, load_checkpoint
from torchmae.training.compilation import first_shapes_only, plain_at_the_end
from torchmae.training.optim import build_optimizers, lr_factor, set_lr
from torchmae.training.parallel import check_parallel
from torchmae.training.progress import Display
from torchmae.training.progression import check_progression, early_images
from torchmae.training.ranks import Ranks, agree_on_signal, one_line_when_lost, part_of
from torchmae.training.run_folder import RunFolder
from torchmae.training.runtime import Runtime
from torchmae.training.signals import stop_signals
from torchmae.training.state import State, diverged, interrupted, restore, save
from torchmae.training.step import prepare, train_step
from torchmae.training.tracking import Tracker
from torchmae.training.update_size import copy_matrices, update_to_weight
from torchmae.training.window import Window, close_window, timed

PROBE_STEPS = 10
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, spread evenly however many there are
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


def pretrain(
    config: PretrainConfig,
    *,
    model: MaskedAutoencoder,
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
    plan = Plan(len(loader), min(config.batch_size, len(loader)), config.seed)
    with one_line_when_lost(ranks), out_of_memory(config, plan.batch_size, runtime):
        total = 0 if checkpoint else plan_steps(config, model, loader, plan, runtime, display)
    masker = Masker(model.encoder, **asdict(config.mask))
    wrapped = prepare(model, config, runtime)
    optimizers = build_optimizers(model, config.optim, plan.batch_size)
    if checkpoint is None:
        state = State(0, total, 0.0, 0.0, runtime.precision, fingerprint)
        save(folder, model, optimizers, state, ranks)
    else:
        state = restore(checkpoint, model, optimizers, runtime.precision)
        state.data = fingerprint
    due = [(frozenset(due_steps(state.total_steps, item.count)), item.run) for item in evaluators]
    model.train()
    saved_at = time.monotonic()
    window = Window(time.perf_counter(), [target.name for target in model.targets])
    images = torch.empty(0)  # of the newest step

    def settle() -> bool:
        """Closes the window; whether too many of its steps were skipped, and the run was rolled back."""
        close_window(window, state, plan, optimizers, tracker, display)
        if window.longest_skipped < config.max_skipped:
            return False
        roll_back(state, model, optimizers, folder, window, display, ranks, images)
        return True

    with (
        one_line_when_lost(ranks),
        stop_signals() as stop,
        out_of_memory(config, plan.batch_size, runtime),
        plain_at_the_end(model),
        first_shapes_only(config.compile) as compiled,
    ):
        for batch in batches_to_come(loader, plan, state, ranks, window):
            set_lr(optimizers, lr_factor(state.step, state.total_steps, config.optim) * state.lr_scale)
            if config.model.drop_path:  # the one thing a model draws itself: from the step, so that a run can go on
                draw = state.step * ranks.world_size + ranks.rank
                torch.manual_seed(config.seed % 2**32 * 2**31 + draw)
            images = early_images(batch.images, model, config, state.step, state.total_steps)
            drawn = masker.at(state.step, state.total_steps).for_images(images)
            mask = drawn(config.seed, batch.epoch, batch.indices, runtime.device)
            num_images = len(plan.indices(state.step)[1])
            state.step += 1
            log_due = state.step % config.log_every == 0
            before = copy_matrices(model) if log_due else None
            step = train_step(
                *(model, optimizers, images, mask, config, runtime),
                wrapped=wrapped,
                parts=part_of(num_images, ranks, config.accumulate),
            )
            compiled()
            window.add(step, num_images)
            if before is not None:
                window.figures = {"grad_norm": step.norm, "update_to_weight": update_to_weight(before, model)}

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


def due_steps(total: int, count: int) -> list[int]:
    """`count` steps evenly spread over 1 .. total, the last of them `total`."""
    return [math.ceil(total * i / count) for i in range(1, count + 1)]


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
    masker = Masker(copied.encoder, **asdict(config.mask))
    ranks = runtime.ranks
    warm_up = PROBE_STEPS // 2
    start = time.perf_counter()
    done = 0
    with (
        plain_at_the_end(copied),  # which also frees it at once: what it calls meanwhile refers to it
        first_shapes_only(config.compile, keep=True) as compiled,
    ):
        wrapped = prepare(copied, config, runtime)
        optimizers = build_optimizers(copied, config.optim, plan.batch_size)
        set_lr(optimizers, 0.0)
        for batch in loader.train_batches(plan, 0, 1_000_000, rank=ranks.rank, world_size=ranks.world_size):
            place = done * _GOLDEN_RATIO % 1  # in the run, whose first and last steps may differ in size
            images = early_images(batch.images, copied, config, place, 1)
            drawn = masker.at(place, 2).for_images(images)
            mask = drawn(config.seed, batch.epoch, batch.indices, runtime.device)
            parts = part_of(len(plan.indices(done)[1]), ranks, config.accumulate)
            train_step(copied, optimizers, images, mask, config, runtime, wrapped=wrapped, parts=parts)[0].item()
            compiled()
            done += 1
            if done == warm_up:
                start = time.perf_counter()
            (elapsed,) = ranks.largest(time.perf_counter() - start)
            if done >= warm_up + PROBE_STEPS and elapsed >= at_least:
                break
    return elapsed / (done - warm_up)


def roll_back(
    state: State,
    model: MaskedAutoencoder,
    optimizers: Sequence[Optimizer],
    folder: RunFolder,
    window: Window,
    display: Display,
    ranks: Ranks,
    images: Tensor,
) -> None:
    """Goes back to the newest checkpoint, in place, at half the learning rate; `images` are those of the newest step.

    Raises:
        TrainingError: that has been done too often.
    """
    problem = f"{window.longest_skipped} steps in a row, by step {state.step}, have no finite loss or gradient"
    checkpoint = load_checkpoint(folder.checkpoints)
    scale = state.lr_scale / 2
    if checkpoint is None or scale < SMALLEST_LR_SCALE:
        raise diverged(problem, folder, images)
    restored = restore(checkpoint, model, optimizers, state.precision)
    vars(state).update(vars(restored), lr_scale=scale)
    if ranks.is_main:
        folder.rewind_metrics(state.step)
    window.forget_skipped()
    window.restart()
    display.warn(
        f"{problem}: back to the checkpoint of step {state.step}, from there at {scale:g} times the learning rate"
    )


@contextmanager
def out_of_memory(config: PretrainConfig, batch_size: int, runtime: Runtime) -> Iterator[None]:
    """Memory that ran out as one line with a way on; other errors as they are.

    Args:
        config: the run's.
        batch_size: images of a step on all ranks together: there may be fewer in all than `config.batch_size`.
        runtime: where it computes.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        share = -(-batch_size // runtime.ranks.world_size)
        parts, more = (part_of(batch_size, runtime.ranks, n * config.accumulate) for n in (1, 2))
        smaller = f"resume with --accumulate {more} (the same steps in less memory)"
        if parts == more:
            smaller = "resume with --checkpoint_activations true, or choose a smaller model"
        raise TrainingError(
            f"out of memory on {runtime.device}: {share} images a step in parts of {-(-share // parts)}",
            f"{smaller}, or start again with --batch_size {max(batch_size // 2, 1)}",
        ) from error


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
