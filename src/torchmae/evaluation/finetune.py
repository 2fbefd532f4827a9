"""Fine-tuning: a classifier trained end to end, from pre-trained weights or from scratch (paper section A.1, table 9).

The folder it leaves holds finetune.json (the settings), metrics.jsonl (the loss of every epoch, the accuracies),
checkpoints/, and model.json with model.safetensors: the classifier, under timm's parameter names.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torchmae
from torchmae.config import DataConfig, OptimConfig
from torchmae.data.loader import Batch, ImageLoader
from torchmae.data.plan import Indices, Plan
from torchmae.data.sources import Subset
from torchmae.errors import CheckpointError, ConfigError, DataError, Interrupted, TrainingError
from torchmae.evaluation.augment import Augment, build_augment
from torchmae.evaluation.few_shot import check_counts, draw_images
from torchmae.evaluation.finetune_config import FinetuneConfig
from torchmae.evaluation.images import Normalisation, check_classes, class_names, rows_with_label
from torchmae.evaluation.scores import Result, Scores, rank, score
from torchmae.evaluation.sharing import share
from torchmae.nn.autoencoder import Autoencoder
from torchmae.nn.classifier import Classifier, encoder_arguments
from torchmae.nn.encoder import ViTEncoder
from torchmae.nn.mae import MaskedAutoencoder, no_weight_decay
from torchmae.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from torchmae.training.optim import lr_factor, set_lr
from torchmae.training.parallel import average_gradients, exchanging
from torchmae.training.pretrain import due_steps
from torchmae.training.progress import Display, Status
from torchmae.training.ranks import ALONE, Ranks, agree_on_signal, part_of
from torchmae.training.run_folder import RunFolder
from torchmae.training.runtime import Runtime
from torchmae.training.saved_classifier import ClassifierDescription, save_classifier
from torchmae.training.signals import stop_signals
from torchmae.training.tracking import JsonLines, Tracker, Trackers
from torchmae.training.window import Window, timed

NAME = "finetune"
EVAL_BATCH = 250
LOG_EVERY = 10


def run(
    model: Autoencoder,
    normalisation: Normalisation,
    train: ImageLoader,
    test: ImageLoader,
    *,
    config: FinetuneConfig,
    runtime: Runtime,
    out: Path,
    **options: Any,
) -> dict[str, float]:
    """The figures of `finetune` alone; arguments as there."""
    return finetune(model, normalisation, train, test, config=config, runtime=runtime, out=out, **options).figures


def finetune(
    model: Autoencoder,
    normalisation: Normalisation,
    train: ImageLoader,
    test: ImageLoader,
    *,
    config: FinetuneConfig,
    runtime: Runtime,
    out: Path,
    labels_per_class: int | None = None,
    draw: int = 0,
    seed: int = 0,
    resume: bool = False,
    display: Display | None = None,
) -> Result:
    """Trains a classifier on labelled images and measures it on others.

    The same settings, weights and images give the same classifier; on the CPU bit for bit, interrupted or not. Of
    several ranks, each computes its part of every batch (DDP). RandAugment, mixup, cutmix and drop-path are drawn by
    each rank for its part: with another number of ranks, other numbers.

    Args:
        model: the pre-trained model; of its weights, the encoder's are used, and with `init="random"` none.
        normalisation: that `model` was trained with.
        train: labelled images, opened with `data_settings`.
        test: images to classify; those without a label, or of a class that `train` does not know, are left out.
        config: how to train.
        runtime: where to compute.
        out: the folder to write; a new one, unless `resume`.
        labels_per_class: so many images of each class; None: all.
        draw: which draw of them, 0 or more.
        seed: of the draws, of random weights, order, crops, flips and augmentation.
        resume: go on from the newest whole checkpoint in `out`.
        display: shows progress; None: nothing.

    Returns:
        figures: finetune, finetune_top5, finetune_low and finetune_high in percent of the test images (see `scores`),
        finetune_loss (mean of the last epoch, on augmented images), finetune_images and finetune_seconds (of training
        alone). They are the last epoch's, never the best one's. details: of each class.

    Raises:
        ConfigError: a model without an encoder of patches, settings that its input cannot have, or fewer labelled
            images than asked for.
        DataError: no labels, or one class only.
        TrainingError: a loss that is not finite.
        Interrupted: by SIGINT or SIGTERM, after the state was saved.
        CheckpointError: nothing to resume, or a disk that is full.
    """
    display = display or Display("none")
    ranks = runtime.ranks
    rows, test_rows = labelled_rows(train, "training"), labelled_rows(test, "test")
    classes = class_names(train.source, test.source)
    check_classes(Subset(train.source, rows), classes)
    assert train.labels is not None
    if labels_per_class is not None:
        check_counts(train.labels[rows], classes, labels_per_class)
        rows = rows[draw_images(train.labels[rows], labels_per_class, seed, draw)]
    job = Job(asdict(config), labels_per_class, draw, seed, train.source.fingerprint())
    torch.manual_seed(job.step_seed(0))
    classifier, arguments = build_classifier(model, len(classes), config)
    fitting = config.for_input(arguments["input_size"], arguments["in_chans"])
    plan = SubsetPlan(len(rows), min(fitting.batch_size, len(rows)), seed, rows=rows)
    augment = build_augment(fitting, arguments["input_size"], normalisation.mean, normalisation.std, len(classes))
    learner = Learner(classifier.to(runtime.device), config, plan.batch_size)
    folder = RunFolder(out)
    if resume:
        state = restore(load_checkpoint(folder.checkpoints, display.warn), learner, job, out)
        ranks.on_main(lambda: folder.rewind_metrics(state.step))
    else:
        state = State(0, config.epochs * plan.steps_per_epoch, 0.0, 0.0, 0.0, asdict(job))
        ranks.on_main(lambda: RunFolder.create(out).write_json("finetune.json", asdict(job)))
        save(folder, learner, state, ranks)

    def measure() -> Scores:
        mine = share(test_rows, EVAL_BATCH, ranks)
        found = predict(learner.result, test.eval_batches(mine.rows, EVAL_BATCH), runtime)
        logits, labels = mine.of_all_images(*found)
        return score(rank(logits), labels, len(classes))

    with Trackers(JsonLines(folder.metrics)) if ranks.is_main else Trackers() as tracker:
        fit(learner, train, plan, augment, config, state, measure, runtime, folder, tracker, display)
        scores = measure()
        done = (line["step"] for line in folder.read_metrics() if line["kind"] == "val") if ranks.is_main else ()
        if state.step not in done:  # a training that had ended has its line already
            tracker.log("val", state.step, scores.figures(NAME))
    mean, std = normalisation.mean, normalisation.std
    described = ClassifierDescription(arguments, mean, std, train.source.classes, torchmae.__version__)
    ranks.on_main(lambda: save_classifier(out, learner.result, described))
    training = {"loss": state.loss, "images": float(len(rows)), "seconds": state.seconds}
    figures = scores.figures(NAME) | {f"{NAME}_{name}": value for name, value in training.items()}
    return Result(figures, {NAME: scores.details(classes)})


def data_settings(
    data: DataConfig, config: FinetuneConfig, model: Autoencoder, normalisation: Normalisation
) -> DataConfig:
    """The same data, cropped as `config` says and normalised as the model was trained with."""
    arguments = encoder_arguments(require_encoder(model))
    crop_scale = config.for_input(arguments["input_size"], arguments["in_chans"]).crop_scale
    return replace(data, crop_scale=crop_scale, mean=normalisation.mean, std=normalisation.std)


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


def labelled_rows(loader: ImageLoader, what: str) -> Indices:
    """The indices of all images with a label; DataError, which calls the images `what`, when there are none."""
    rows = rows_with_label(loader.labels)
    if not len(rows):
        raise DataError(f"none of the {what} images has a label", "put them in one folder for each class")
    return rows


def require_encoder(model: Autoencoder) -> ViTEncoder:
    """The model's encoder of patches; ConfigError for one that has none."""
    if not isinstance(model, MaskedAutoencoder):
        raise ConfigError("the mlp model cannot be fine-tuned", "use a vit model")
    return model.encoder


def build_classifier(model: Autoencoder, num_classes: int, config: FinetuneConfig) -> tuple[Classifier, dict[str, Any]]:
    """The classifier that training starts from, and the arguments that rebuild it.

    Random weights are drawn from torch's generator.

    Raises:
        ConfigError: a model without an encoder of patches.
    """
    encoder = require_encoder(model)
    arguments = {**encoder_arguments(encoder), "drop_path": config.drop_path, "num_classes": num_classes}
    classifier = Classifier(**arguments)
    if config.init == "pretrained":
        classifier.copy_encoder(encoder)
    return classifier, arguments


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
    measure: Callable[[], Scores],
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
        measure: called between epochs where `config.evaluations` asks for it; its figures are logged.
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
    wrapped = average_gradients(learner.classifier, runtime, config.accumulate) if ranks.world_size > 1 else None
    schedule = OptimConfig(warmup=config.warmup, min_lr=config.min_lr)
    due = {math.ceil(step / plan.steps_per_epoch) for step in due_steps(state.total_steps, config.evaluations)[:-1]}
    learner.train()
    saved_at = time.monotonic()
    window = Window(time.perf_counter())
    with stop_signals() as stop:
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
            window.losses.append(loss)
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
                    tracker.log("val", state.step, measure().figures(NAME))
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
    losses = torch.stack(window.losses).tolist()
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
    """Saves a checkpoint; every rank calls it. CheckpointError when the disk is full or cannot be written."""
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
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{checkpoint.path} does not fit the model: {reason}", "resume with the model it began with"
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
        if old.get(name) != value and name not in ("settings", "checkpoint_minutes"):
            raise ConfigError(
                f"{name} is {value} and was {old.get(name)} in {out}", "resume with the settings it began with"
            )


@torch.no_grad()
def predict(model: Classifier, batches: Iterable[Batch], runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Logits and labels of all images that have a label.

    Args:
        model: put into eval mode.
        batches: images without augmentation.
        runtime: where to compute.

    Returns:
        (N, num_classes) float32 and (N,) int64, on the model's device.
    """
    model.eval()
    logits, labels = [], []
    for batch in batches:
        with runtime.autocast():
            logits.append(model(batch.images).float())
        labels.append(batch.labels)
    known = torch.cat(labels) >= 0
    return torch.cat(logits)[known], torch.cat(labels)[known]
