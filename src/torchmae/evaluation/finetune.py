"""Fine-tuning: a classifier trained end to end, from pre-trained or random weights (paper section A.1, table 9).

Its folder holds finetune.json (the settings), metrics.jsonl (the loss of every epoch, the accuracies), checkpoints/,
and model.json with model.safetensors: the classifier, under timm's parameter names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import torchmae
from torchmae.config.evaluate import EvaluateOptions
from torchmae.config.finetune import FinetuneConfig
from torchmae.data.loader import Batch, ImageLoader
from torchmae.data.sources import digest
from torchmae.data.transforms import Normalisation
from torchmae.errors import CheckpointError, ConfigError
from torchmae.evaluation.bench import Bench, draw_images, output_folder
from torchmae.evaluation.finetune_training import FinetuneTask, SubsetPlan, trained_in
from torchmae.evaluation.images import EVAL_BATCH, read_batches, run_data
from torchmae.evaluation.scores import Result, over_draws, rank, score
from torchmae.evaluation.sharing import share
from torchmae.evaluation.subject import Subject
from torchmae.nn.classifier import Classifier
from torchmae.nn.encoder import Encoder
from torchmae.nn.mae import MaskedAutoencoder, require_patches
from torchmae.training.compilation import check_compiler
from torchmae.training.progress import Display
from torchmae.training.runtime import Runtime
from torchmae.training.saved_classifier import ClassifierDescription, build_classifier, save_classifier
from torchmae.training.task import seeded, step_seed
from torchmae.training.trainer import Evaluator

NAME = "finetune"


def measure(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    """The figures of `finetune`; few-shot, `over_draws` of several trainings."""
    assert subject.model is not None
    model, data, config, few = subject.model, bench.data, options.finetune, options.labels_per_class
    out = finetune_folder(bench.run, options)
    arguments = require_encoder(model).arguments
    bench.runtime.ranks.on_main(lambda: check_start(out, bool(options.resume), config, bench.runtime))
    crop_scale = config.for_input(arguments["input_size"], arguments["in_chans"]).crop_scale
    train = data.train.augmented(replace(run_data(bench.run), crop_scale=crop_scale))
    folders = [out] if few is None else [out / f"draw-{draw}" for draw in range(options.draws)]
    begun = bench.runtime.ranks.on_main(lambda: [(folder / "finetune.json").exists() for folder in folders])
    results = [
        finetune(
            model,
            data.normalisation,
            train,
            data.test.loader,
            data.classes,
            config=config,
            runtime=bench.runtime,
            out=folder,
            labels_per_class=few,
            draw=draw,
            seed=options.seed,
            resume=bool(options.resume) and (few is None or begun[draw]),
            display=bench.display,
            test_batch_size=data.test.model.batch_size,
            groups=data.train.groups,
            reading=data.train.reading,
        )
        for draw, folder in enumerate(folders)
    ]
    figures, details, _ = results[0]
    if few is not None:
        kept = [name for name in figures if not name.endswith(("_low", "_high"))]
        figures, details, _ = over_draws([{name: item.figures[name] for name in kept} for item in results], [NAME])
    left = "the classifier is" if few is None else "the classifier of each draw is"
    notes = [f"fine-tuned on {figures[f'{NAME}_images']:,.0f} labelled images; {left} in {out}"]
    if config.init == "random":
        # Another name, so that a report does not take these figures for those of the pre-trained weights.
        figures, details = (
            {name.replace(NAME, f"{NAME}_random", 1): value for name, value in item.items()}
            for item in (figures, details)
        )
        notes.append("trained from random weights: of the model only its architecture is used")
    return Result(figures, details, tuple(notes))


def finetune_folder(run: str, options: EvaluateOptions) -> Path:
    """The option `out`, else a folder in the run, named after the main settings."""
    folder = output_folder(run, options)
    if options.out is not None:
        return folder
    count = options.labels_per_class
    parts = [options.finetune.init, *([f"{count}-per-class"] if count else [])]
    return folder / "-".join([NAME, *parts, *([f"seed{options.seed}"] if options.seed else [])])


def check_start(out: Path, resume: bool, config: FinetuneConfig, runtime: Runtime) -> None:
    """Checks that a fine-tuning can begin or resume, before it writes anything.

    Raises:
        ConfigError: a compiler is missing, or `out` holds files when a fine-tuning begins.
        CheckpointError: `out` holds no files when one resumes.
    """
    if config.compile and runtime.device.type == "cpu":
        check_compiler()
    begun = out.is_dir() and any(not item.name.startswith(".") for item in out.iterdir())
    if begun and not resume:
        raise ConfigError(f"{out} exists already", "go on with --resume, or choose another --out")
    if resume and not begun:
        raise CheckpointError(f"{out} holds no fine-tuning to go on with", "leave --resume out to begin one")


def finetune(
    model: MaskedAutoencoder,
    normalisation: Normalisation,
    train: ImageLoader,
    test: ImageLoader,
    classes: Sequence[str],
    *,
    config: FinetuneConfig,
    runtime: Runtime,
    out: Path,
    labels_per_class: int | None = None,
    draw: int = 0,
    seed: int = 0,
    resume: bool = False,
    display: Display,
    test_batch_size: int = EVAL_BATCH,
    groups: Tensor | None = None,
    reading: dict[str, Any] | None = None,
) -> Result:
    """Trains a classifier on labelled images and measures it on others.

    The same settings, weights and images give the same classifier; on the CPU bit for bit, interrupted or not. On
    several ranks, each rank computes a part of every batch (DDP) and draws RandAugment, mixup, cutmix and drop-path
    for it: another number of ranks draws other numbers.

    Args:
        model: the pre-trained model; its encoder's weights are used, none of them with `init="random"`.
        normalisation: of the model's training.
        train: labelled images, cropped as `config` says.
        test: labelled images to classify.
        classes: the names of the labels.
        config: how to train.
        runtime: where to compute.
        out: the folder to write; a new one, unless `resume`.
        labels_per_class: number of training images of each class; None: all.
        draw: number of the draw of these images, 0 or more.
        seed: of the draws, random weights, order, crops, flips and augmentation.
        resume: go on from the newest whole checkpoint in `out`.
        display: shows progress.
        test_batch_size: images in a forward pass over `test`.
        groups: (N,) of the images of `train`, as of `ImageSet.groups`; None: each stands alone.
        reading: as of `ImageSet.reading`, which a training to resume must share.

    Returns:
        `scores.score` of "finetune" after the last epoch (not the best one), with finetune_loss (mean of the last
        epoch, on augmented images), finetune_images and finetune_seconds (of training alone).

    Raises:
        ConfigError: a model without patches, or settings that do not fit its input.
        DataError: other images or labels than those of the training to resume.
        TrainingError, Interrupted: as of `trainer.train`.
        CheckpointError: nothing to resume, another process in the folder, or a full disk.
    """
    ranks = runtime.ranks
    rows = np.arange(len(train))
    if labels_per_class is not None:
        assert train.labels is not None
        rows = draw_images(train.labels, labels_per_class, seed, draw, None if groups is None else groups.numpy())
    about: dict[str, Any] = {"labels_per_class": labels_per_class, "draw": draw, "seed": seed, "reading": reading}
    about["rows"] = None if labels_per_class is None else digest(rows.tolist())
    about |= {"data": train.source.fingerprint(), "labels": train.source.label_fingerprint()}
    job = {"settings": asdict(config), **about}
    with seeded(step_seed(seed, 0)):
        classifier, arguments = start_classifier(model, len(classes), config)
    fitting = config.for_input(arguments["input_size"], arguments["in_chans"])
    plan = SubsetPlan(len(rows), min(fitting.batch_size, len(rows)), seed, rows=rows)
    from torchmae.evaluation.augment import build_augment  # loads torchvision

    augment = build_augment(fitting, arguments["input_size"], normalisation, len(classes))
    task = FinetuneTask(config, classifier.to(runtime.device), augment, runtime, plan.batch_size, seed)
    measured: list[Result] = []

    def scores_now() -> Result:
        mine = share(np.arange(len(test)), test_batch_size, ranks)
        found = predict(task.model.result, read_batches(test, mine.rows, test_batch_size), runtime)
        rankings, labels = mine.of_all_images(*found)
        return score(NAME, rankings, labels, classes)

    def figures_now(_: int) -> dict[str, float]:
        measured.append(scores_now())
        return measured[-1].figures

    at_ends = [Evaluator(config.evaluations, figures_now, at_epoch_ends=True)]
    trained = trained_in(out, task, train, plan, job, display, resume=resume, evaluators=at_ends)
    with trained as (state, tracker, folder):
        scores = measured[-1] if measured else scores_now()  # of a training that had ended
        done = (line["step"] for line in folder.read_metrics() if line["kind"] == "val") if ranks.is_main else ()
        if state.step not in done:
            tracker.log("val", state.step, scores.figures)
    described = ClassifierDescription(
        arguments, classes=train.source.classes, torchmae=torchmae.__version__, **asdict(normalisation)
    )
    ranks.on_main(lambda: save_classifier(out, task.model.result, described))
    training = {"loss": state.loss, "images": float(len(rows)), "seconds": state.seconds}
    return Result(scores.figures | {f"{NAME}_{name}": value for name, value in training.items()}, scores.details)


def require_encoder(model: MaskedAutoencoder) -> Encoder:
    """The model's encoder; ConfigError for one without patches, or one that cannot be built again as a classifier."""
    require_patches(model, "to fine-tune on")
    if not model.encoder.arguments:
        raise ConfigError("the encoder does not say how to make one like it", "use another --method, such as linear")
    return model.encoder


def start_classifier(
    model: MaskedAutoencoder, num_classes: int, config: FinetuneConfig
) -> tuple[Classifier, dict[str, Any]]:
    """The classifier before training, with random weights of torch's generator, and the arguments to build it again."""
    encoder = require_encoder(model)
    arguments = {**encoder.arguments, "drop_path": config.drop_path, "num_classes": num_classes}
    classifier = build_classifier(arguments)
    if config.init == "pretrained":
        classifier.copy_encoder(encoder)
    return classifier, arguments


@torch.no_grad()
def predict(model: Classifier, batches: Iterable[Batch], runtime: Runtime) -> tuple[list[Tensor], list[Tensor]]:
    """Rankings, as of `scores.rank`, and labels of each batch; puts the model into eval mode."""
    model.eval()
    rankings, labels = [], []
    for batch in batches:
        with runtime.autocast():
            rankings.append(rank(model(batch.images).float()))
        labels.append(batch.labels)
    return rankings, labels
