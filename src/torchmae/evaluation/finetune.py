"""Fine-tuning: a classifier trained end to end, from pre-trained weights or from scratch (paper section A.1, table 9).

The folder it leaves holds finetune.json (the settings), metrics.jsonl (the loss of every epoch, the accuracies),
checkpoints/, and model.json with model.safetensors: the classifier, under timm's parameter names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import torchmae
from torchmae.config import DataConfig
from torchmae.config.finetune import FinetuneConfig
from torchmae.data.loader import Batch, ImageLoader
from torchmae.data.sources import Subset
from torchmae.data.transforms import Normalisation
from torchmae.data.worker import Indices
from torchmae.errors import DataError
from torchmae.evaluation.augment import build_augment
from torchmae.evaluation.few_shot import check_counts, draw_images
from torchmae.evaluation.finetune_training import FinetuneTask, SubsetPlan, check_same
from torchmae.evaluation.images import check_classes, class_names, rows_with_label
from torchmae.evaluation.scores import Result, Scores, rank, score
from torchmae.evaluation.sharing import share
from torchmae.nn.classifier import Classifier, encoder_arguments
from torchmae.nn.encoder import ViTEncoder
from torchmae.nn.mae import MaskedAutoencoder, require_patches
from torchmae.training.checkpoint import Checkpoint, load_checkpoint
from torchmae.training.progress import Display
from torchmae.training.run_folder import RunFolder
from torchmae.training.runtime import Runtime
from torchmae.training.saved_classifier import ClassifierDescription, save_classifier
from torchmae.training.state import State
from torchmae.training.task import seeded, step_seed
from torchmae.training.tracking import JsonLines, Trackers
from torchmae.training.trainer import Evaluator
from torchmae.training.trainer import train as train_task

NAME = "finetune"
EVAL_BATCH = 250


def finetune(
    model: MaskedAutoencoder,
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
        TrainingError: losses or gradients that are not finite, also after the training was rolled back; memory that ran
            out; another rank that is gone.
        Interrupted: by SIGINT or SIGTERM, after the state was saved.
        CheckpointError: nothing to resume, or a disk that is full.
    """
    display = display or Display("none")
    ranks = runtime.ranks
    rows, test_rows = labelled_rows(train, "training"), labelled_rows(test, "test")
    classes = class_names(train.source)
    check_classes(Subset(train.source, rows), classes)
    assert train.labels is not None
    if labels_per_class is not None:
        check_counts(train.labels[rows], classes, labels_per_class)
        rows = rows[draw_images(train.labels[rows], labels_per_class, seed, draw)]
    about = {"labels_per_class": labels_per_class, "draw": draw, "seed": seed, "data": train.source.fingerprint()}
    job = json.loads(json.dumps({"settings": asdict(config), **about}))  # with lists for tuples, as files have it
    with seeded(step_seed(seed, 0)):
        classifier, arguments = build_classifier(model, len(classes), config)
    fitting = config.for_input(arguments["input_size"], arguments["in_chans"])
    plan = SubsetPlan(len(rows), min(fitting.batch_size, len(rows)), seed, rows=rows)
    augment = build_augment(fitting, arguments["input_size"], normalisation.mean, normalisation.std, len(classes))
    task = FinetuneTask(config, classifier.to(runtime.device), augment, runtime, plan.batch_size, seed)
    folder = RunFolder(out)
    checkpoint = load_checkpoint(folder.checkpoints, display.warn, ranks) if resume else None
    if resume:
        check_same(checkpoint, job, out)
    ranks.on_main(lambda: begin(folder, job, checkpoint))
    measured: list[Scores] = []

    def measure() -> Scores:
        mine = share(test_rows, EVAL_BATCH, ranks)
        found = predict(task.model.result, test.eval_batches(mine.rows, EVAL_BATCH), runtime)
        logits, labels = mine.of_all_images(*found)
        return score(rank(logits), labels, len(classes))

    def figures_now(_: int) -> dict[str, float]:
        measured.append(measure())
        return measured[-1].figures(NAME)

    with Trackers(JsonLines(folder.metrics)) if ranks.is_main else Trackers() as tracker:
        state = train_task(
            task,
            State(0, config.epochs * plan.steps_per_epoch, precision=runtime.precision, data=job["data"], job=job),
            loader=train,
            plan=plan,
            folder=folder,
            tracker=tracker,
            display=display,
            evaluators=[Evaluator(config.evaluations, figures_now, at_epoch_ends=True)],
            checkpoint=checkpoint,
        )
        scores = measured[-1] if measured else measure()  # of a training that had ended
        done = (line["step"] for line in folder.read_metrics() if line["kind"] == "val") if ranks.is_main else ()
        if state.step not in done:
            tracker.log("val", state.step, scores.figures(NAME))
    mean, std = normalisation.mean, normalisation.std
    described = ClassifierDescription(arguments, mean, std, train.source.classes, torchmae.__version__)
    ranks.on_main(lambda: save_classifier(out, task.model.result, described))
    training = {"loss": state.loss, "images": float(len(rows)), "seconds": state.seconds}
    figures = scores.figures(NAME) | {f"{NAME}_{name}": value for name, value in training.items()}
    return Result(figures, {NAME: scores.details(classes)})


def begin(folder: RunFolder, job: dict[str, Any], checkpoint: Checkpoint | None) -> None:
    """Makes the folder of a new training; of a resumed one, leaves out what came after the checkpoint."""
    if checkpoint is None:
        RunFolder.create(folder.path).write_json("finetune.json", job)
        return
    folder.rewind_metrics(checkpoint.state["step"])
    if checkpoint.state["job"] != job:
        folder.write_json("finetune.json", job)


def data_settings(
    data: DataConfig, config: FinetuneConfig, model: MaskedAutoencoder, normalisation: Normalisation
) -> DataConfig:
    """The same data, cropped as `config` says and normalised as the model was trained with."""
    arguments = encoder_arguments(require_encoder(model))
    crop_scale = config.for_input(arguments["input_size"], arguments["in_chans"]).crop_scale
    return replace(data, crop_scale=crop_scale, mean=normalisation.mean, std=normalisation.std)


def labelled_rows(loader: ImageLoader, what: str) -> Indices:
    """The indices of all images with a label; DataError, which calls the images `what`, when there are none."""
    rows = rows_with_label(loader.labels)
    if not len(rows):
        raise DataError(f"none of the {what} images has a label", "put them in one folder for each class")
    return rows


def require_encoder(model: MaskedAutoencoder) -> ViTEncoder:
    """The model's encoder of patches; ConfigError for one that has none."""
    require_patches(model, "to fine-tune on")
    return cast(ViTEncoder, model.encoder)


def build_classifier(
    model: MaskedAutoencoder, num_classes: int, config: FinetuneConfig
) -> tuple[Classifier, dict[str, Any]]:
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
