"""The methods of `torchmae evaluate`: each takes images, features and options to the figures of one subject."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchmae import settings
from torchmae.config import DataConfig
from torchmae.config.evaluate import EvaluateOptions
from torchmae.data.loader import Batch
from torchmae.errors import CheckpointError, ConfigError
from torchmae.evaluation import anomaly, attentive, few_shot, finetune, knn, linear
from torchmae.evaluation.images import EvaluationData, ImageSet, fixed_rows
from torchmae.evaluation.scores import Labelled, Result, combine, score
from torchmae.evaluation.sharing import share
from torchmae.evaluation.subject import PIXELS, RANDOM, Subject, extract_features
from torchmae.paths import user_path
from torchmae.training.progress import Display
from torchmae.training.runtime import Runtime

ANOMALY = "anomaly"


class Bench:
    """Data, a place to compute, and the features computed so far: each image is encoded once a subject.

    Of several ranks, each encodes a share of the images.

    Args:
        data: the images.
        runtime: where to compute.
        display: shows progress.
        run: what is evaluated: a folder, "random" or "pixels".
        mask_ratio: share of the patches that was hidden when the model was trained.
    """

    def __init__(
        self, data: EvaluationData, runtime: Runtime, display: Display, run: str, mask_ratio: float = 0.75
    ) -> None:
        self.data = data
        self.runtime = runtime
        self.display = display
        self.run = run
        self.mask_ratio = mask_ratio
        self._cache: dict[tuple[str, str], Labelled] = {}

    def features(self, subject: Subject, pool: str) -> tuple[Labelled, Labelled]:
        """Features of the training and of the test images."""
        return self._features(subject, "train", pool), self._features(subject, "test", pool)

    def _features(self, subject: Subject, split: str, pool: str) -> Labelled:
        widest = subject.pools[-1]  # "both" holds the other two: one pass over the images serves all three
        if (subject.name, split) not in self._cache:
            images: ImageSet = getattr(self.data, split)
            mine = images.share(self.runtime.ranks)
            batches = self._shown(images.only(mine.rows), f"encoding {split} images, {subject.name}")
            encoded = extract_features(subject, batches, self.runtime, widest)
            self._cache[subject.name, split] = Labelled(*mine.of_all_images(*encoded))
        held = self._cache[subject.name, split]
        if pool == widest:
            return held
        width = held.features.shape[1] // 2
        part = held.features[:, :width] if pool == "mean" else held.features[:, width:]
        return Labelled(part, held.labels)

    def _shown(self, images: ImageSet, what: str) -> Iterator[Batch]:
        done = 0
        for batch in images.batches():
            yield batch
            done += len(batch.labels)
            self.display.preparing(what, done, len(images))


Method = Callable[[Bench, Subject, EvaluateOptions], Result]


def _knn(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    train, test = bench.features(subject, chosen_pool(subject, options) or "mean")
    return _classified(train, test, knn.classify, bench, options)


def _linear(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    pool = chosen_pool(subject, options)
    results = []
    for kind in (pool,) if pool else subject.pools:

        def classify(train: Labelled, test: Labelled, num_classes: int, kind: str = kind) -> dict[str, Tensor]:
            if options.protocol == "paper":
                return {f"linear_paper_{kind}": linear.classify_paper(train, test, num_classes, seed=options.seed)}
            guesses = {f"linear_{kind}": linear.classify(train, test, num_classes, seed=options.seed)}
            if kind == "mean":
                guesses[f"linear_c{linear.FIXED_C}"] = linear.classify(train, test, num_classes, c=linear.FIXED_C)
            return guesses

        results.append(_classified(*bench.features(subject, kind), classify, bench, options))
    return _joined(results)


def _attentive(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    if not subject.has_tokens:
        raise ConfigError("attentive probing needs patch tokens", "evaluate a vit model, or use knn or linear")
    classes = bench.data.classes
    ranking, labels = attentive.classify(
        subject,
        bench.data.train,
        bench.data.test,
        len(classes),
        runtime=bench.runtime,
        options=options.attentive,
        seed=options.seed,
        progress=bench.display.preparing,
    )
    return combine({"attentive": score(ranking, labels, len(classes))}, classes)


def _reconstruction(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    from torchmae.evaluation import quality  # scikit-image is optional

    if subject.model is None:
        raise ConfigError("pixels reconstruct nothing", "evaluate a run, or random with --preset")
    data = bench.data
    mixed = fixed_rows(len(data.test), options.reconstruction.images)
    mine = share(np.arange(len(mixed)), quality.BATCH, bench.runtime.ranks)
    images = torch.cat([batch.images for batch in data.test.only(mixed[mine.rows]).batches()])
    return quality.measure(
        subject.model,
        images,
        share=mine,
        normalisation=data.normalisation,
        runtime=bench.runtime,
        ratios=options.reconstruction.ratios,
        strategies=options.reconstruction.strategies,
        seed=options.seed,
    )


def _finetune(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    if subject.model is None:
        raise ConfigError("pixels cannot be fine-tuned", "evaluate a run, or random with --preset")
    model, data, config, ranks = subject.model, bench.data, options.finetune, bench.runtime.ranks
    out = finetune_folder(bench.run, options)
    augmentation = finetune.data_settings(run_data(bench.run) or DataConfig(), config, model, data.normalisation)
    ranks.on_main(lambda: check_folder(out, bool(options.resume)))
    train = data.train.augmented(augmentation)

    def trained(folder: Path, draw: int, resume: bool) -> Result:
        return finetune.finetune(
            model,
            data.normalisation,
            train,
            data.test.loader,
            config=config,
            runtime=bench.runtime,
            out=folder,
            labels_per_class=options.labels_per_class,
            draw=draw,
            seed=options.seed,
            resume=resume,
            display=bench.display,
        )

    if options.labels_per_class is None:
        figures, details, _ = trained(out, 0, bool(options.resume))
    else:
        folders = [out / f"draw-{draw}" for draw in range(options.draws)]
        begun = ranks.on_main(
            lambda: [bool(options.resume) and (folder / "finetune.json").exists() for folder in folders]
        )
        results = [trained(folder, draw, begun[draw]) for draw, folder in enumerate(folders)]
        figures, details = over_draws([result.figures for result in results])
    count = f"{figures[f'{finetune.NAME}_images']:,.0f}"
    left = "the classifier is" if options.labels_per_class is None else "the classifier of each draw is"
    notes: tuple[str, ...] = (f"fine-tuned on {count} labelled images; {left} in {out}",)
    if config.init == "random":
        # Under a name of its own: in a report it must not be taken for what the pre-trained weights gave.
        figures, details = (
            {name.replace(finetune.NAME, f"{finetune.NAME}_random", 1): value for name, value in item.items()}
            for item in (figures, details)
        )
        notes += ("trained from random weights: of the model only its architecture is used",)
    return Result(figures, details, notes)


def _anomaly(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    assert subject.model is not None
    out = output_folder(bench.run, options)
    figures = anomaly.run(
        subject.model,
        bench.data.train,
        bench.data.test,
        runtime=bench.runtime,
        ratio=bench.mask_ratio,
        seed=options.seed,
        normalisation=bench.data.normalisation,
        out=out,
        display=bench.display,
    )
    written = [name for name in ("anomaly.png", "anomaly_scores.csv") if (out / name).exists()]
    return Result(figures, {}, (f"{' and '.join(written)} {'are' if len(written) > 1 else 'is'} in {out}",))


METHODS: dict[str, Method] = {
    "knn": _knn,
    "linear": _linear,
    "attentive": _attentive,
    "reconstruction": _reconstruction,
    "finetune": _finetune,
    ANOMALY: _anomaly,
}
"""Every method by name: what `--method` takes, beside "all"."""

WITHOUT_LABELS = frozenset({"reconstruction"})


def finetune_folder(run: str, options: EvaluateOptions) -> Path:
    """The folder of a fine-tuning: the one asked for, or one in the run that is named after the main settings."""
    folder = output_folder(run, options)
    if options.out is not None:
        return folder
    count = options.labels_per_class
    parts = [options.finetune.init, *([f"{count}-per-class"] if count else [])]
    return folder / "-".join([finetune.NAME, *parts, *([f"seed{options.seed}"] if options.seed else [])])


def output_folder(run: str, options: EvaluateOptions) -> Path:
    """The folder asked for, or the run's own; ConfigError where none is asked for and the run is no folder."""
    if options.out is None and (run == RANDOM or not user_path(run).is_dir()):
        raise ConfigError(f"out is not given, and {run} is no folder", "add --out DIR")
    return user_path(run if options.out is None else options.out)


def check_folder(out: Path, resume: bool) -> None:
    """Raises unless `out` holds a fine-tuning when one is resumed, and nothing when one is begun."""
    begun = out.is_dir() and any(not item.name.startswith(".") for item in out.iterdir())
    if begun and not resume:
        raise ConfigError(f"{out} exists already", "go on with --resume, or choose another --out")
    if resume and not begun:
        raise CheckpointError(f"{out} holds no fine-tuning to go on with", "leave --resume out to begin one")


def over_draws(draws: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures of several fine-tunings as their means, the deviation of top-1, and as details its values."""
    names = [name for name in draws[0] if not name.endswith(("_low", "_high"))]
    figures = {name: mean(figures[name] for figures in draws) for name in names}
    shares = [figures[finetune.NAME] for figures in draws]
    deviation = {f"{finetune.NAME}_std": stdev(shares) if len(shares) > 1 else 0.0}
    return figures | deviation, {finetune.NAME: {"draws": shares}}


def run_data(run: str) -> DataConfig | None:
    """The data that a run was trained on; None where that is not known."""
    config = user_path(run) / "config.yaml"
    return None if run in (RANDOM, PIXELS) or not config.is_file() else settings.read_config(config).data


def chosen_pool(subject: Subject, options: EvaluateOptions) -> str | None:
    """The pool asked for, which a baseline that has only one kind of features does not have to have.

    Raises:
        ConfigError: the evaluated model does not have it.
    """
    if options.pool is None or options.pool in subject.pools:
        return options.pool
    if subject.model is None:
        return "mean"
    raise ConfigError(f"pool is {options.pool!r} but the model has no class token", "use --pool mean")


def _classified(
    train: Labelled, test: Labelled, classify: few_shot.Classify, bench: Bench, options: EvaluateOptions
) -> Result:
    """A probe's result: on all training images, or few-shot."""
    classes = bench.data.classes
    if options.labels_per_class is not None:
        return few_shot.measure(
            train,
            test,
            classify,
            classes=classes,
            labels_per_class=options.labels_per_class,
            draws=options.draws,
            seed=options.seed,
        )
    guesses = classify(train, test, len(classes))
    return combine({name: score(item, test.labels, len(classes)) for name, item in guesses.items()}, classes)


def _joined(results: Sequence[Result]) -> Result:
    """Several results of one subject as one."""
    figures = {name: value for result in results for name, value in result.figures.items()}
    return Result(figures, {name: value for result in results for name, value in result.details.items()})
