"""What a method of `torchmae evaluate` is, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from torchmae.config.evaluate import ComputeOptions, EvaluateOptions
from torchmae.data.loader import Indices, one_line_when_a_worker_ends
from torchmae.errors import ConfigError
from torchmae.evaluation.images import EvaluationData, ImageSet, ModelInput
from torchmae.evaluation.scores import Labelled, Result, join, over_draws, score
from torchmae.evaluation.subject import RANDOM, Subject, extract
from torchmae.paths import user_path
from torchmae.random import Purpose, permutation
from torchmae.training.progress import Display
from torchmae.training.ranks import one_line_when_lost, open_ranks
from torchmae.training.runtime import Runtime, open_runtime

Classify = Callable[[Labelled, Labelled, int], dict[str, Tensor]]
"""From training and test features and the number of classes to guesses by name, as `scores.rank` gives them."""


@contextmanager
def opened(compute: ComputeOptions, kept: str) -> Iterator[tuple[Runtime, Display]]:
    """Where a command computes, with its ranks, and its display; `kept` says how to go on when a rank is lost."""
    with (
        open_ranks(compute.device) as ranks,
        one_line_when_lost(ranks, kept),
        one_line_when_a_worker_ends(),
        closing(Display(compute.progress if ranks.is_main else "none")) as display,
    ):
        yield open_runtime(compute.device, compute.precision, compute.threads, ranks), display


@dataclass
class Bench:
    """Data, a place to compute, and the features computed so far: each image is encoded once a subject.

    Of several ranks, each encodes a share of the images.

    Attributes:
        data: the images.
        runtime: where to compute.
        display: shows progress.
        run: what is evaluated: a folder, "random" or "pixels".
        mask_ratio: share of the patches that was hidden when the model was trained.
    """

    data: EvaluationData
    runtime: Runtime
    display: Display
    run: str
    mask_ratio: float = 0.75
    _cache: dict[tuple[str, str], Labelled] = field(default_factory=dict)

    def probe(self, subject: Subject, pool: str, classify: Classify, options: EvaluateOptions) -> Result:
        """What a classifier of features makes of the test images.

        Returns:
            of each kind of guesses what `scores.score` says. Few-shot, the mean over draws of its accuracy, and with
            _std the deviation; details: the accuracy of each draw.
        """
        train, test = (self._features(subject, split, pool) for split in ("train", "test"))
        classes = self.data.classes
        if options.labels_per_class is None:
            guesses = classify(train, test, len(classes))
            return join(score(name, ranking, test.labels, classes) for name, ranking in guesses.items())
        draws = []
        check_counts(train.labels.cpu().numpy(), classes, options.labels_per_class)
        for few in draws_of(train, options.labels_per_class, options.draws, options.seed):
            guesses = classify(few, test, len(classes))
            draws.append({n: score(n, ranking, test.labels, classes).figures[n] for n, ranking in guesses.items()})
        return over_draws(draws, [*draws[0]])

    def _features(self, subject: Subject, split: str, pool: str) -> Labelled:
        widest = subject.pools[-1]  # "both" holds the other two: one pass over the images serves all three
        if (subject.name, split) not in self._cache:
            images: ImageSet = getattr(self.data, split)
            share, batches = images.shared(self.runtime.ranks, f"encoding {split} images, {subject.name}")
            self._cache[subject.name, split] = extract(subject, batches, self.runtime, widest, share)
        held = self._cache[subject.name, split]
        if pool == widest:
            return held
        width = held.features.shape[1] // 2
        part = held.features[:, :width] if pool == "mean" else held.features[:, width:]
        return Labelled(part, held.labels)


_NEEDS = {
    "model": ("network", "evaluate a run, or random with --preset"),
    "tokens": ("patch tokens", "evaluate a vit model, or use knn or linear"),
    "training": ("trained weights", "give a run folder"),
}


@dataclass(frozen=True)
class Method:
    """A row of `methods.METHODS`.

    Attributes:
        measure: takes images, a subject and the options to figures.
        needs: what a subject has to be: "features" (anything), "model" (also an untrained one), "tokens" (a model with
            patches) or "training" (a trained model).
        labelled: take only images with a label, and insist on two classes.
        beside: with `--method all`, also measured on these: "random", "pixels". Empty: not part of "all".
        compared: likewise, when the method is asked for alone.
        left_out: why "all" leaves the method out, or one of its baselines is, a sentence; empty: it is not.
        open: opens the images; None: as `images.open_evaluation_data`, of the run's own data where none is named.
    """

    measure: Callable[[Bench, Subject, EvaluateOptions], Result]
    needs: Literal["features", "model", "tokens", "training"] = "features"
    labelled: bool = True
    beside: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()
    left_out: Callable[[Bench, Subject, EvaluateOptions], str] = lambda *_: ""
    open: Callable[[EvaluateOptions, ModelInput], EvaluationData] | None = None

    def baselines(self, options: EvaluateOptions) -> tuple[str, ...]:
        """The names of what is measured beside the run."""
        return self.beside if options.method == "all" else self.compared

    def suits(self, subject: Subject) -> bool:
        """Whether a subject is what the method needs."""
        is_model = subject.model is not None
        found = {"model": is_model, "tokens": subject.has_tokens, "training": is_model and subject.name != RANDOM}
        return found.get(self.needs, True)

    def check(self, name: str, subject: Subject, run: str) -> None:
        """ConfigError unless the method, called `name`, suits the subject, which the user calls `run`."""
        if not self.suits(subject):
            what, fix = _NEEDS[self.needs]
            raise ConfigError(f"{run!r} has no {what}, which method {name!r} needs", fix)


def chosen_pools(subject: Subject, options: EvaluateOptions, default: Sequence[str]) -> Sequence[str]:
    """The pool asked for, else the default; a baseline with one kind of features does not have to have it.

    Raises:
        ConfigError: the evaluated model does not have it.
    """
    if options.pool is None:
        return default
    if options.pool in subject.pools:
        return (options.pool,)
    if subject.model is None:
        return ("mean",)
    raise ConfigError(f"pool is {options.pool!r} but the model has no class token", "use --pool mean")


def output_folder(run: str, options: EvaluateOptions) -> Path:
    """The folder asked for, or the run's own; ConfigError where none is asked for and the run is no folder."""
    if options.out is None and (run == RANDOM or not user_path(run).is_dir()):
        raise ConfigError(f"out is not given, and {run} is no folder", "add --out DIR")
    return user_path(run if options.out is None else options.out)


def draws_of(train: Labelled, labels_per_class: int, draws: int, seed: int) -> Iterator[Labelled]:
    """`labels_per_class` images of each class, `draws` times."""
    labels = train.labels.cpu().numpy()
    for draw in range(draws):
        chosen = torch.from_numpy(draw_images(labels, labels_per_class, seed, draw)).to(train.labels.device)
        yield Labelled(train.features[chosen], train.labels[chosen])


def check_counts(labels: Indices, classes: Sequence[str], labels_per_class: int) -> None:
    """ConfigError unless every class among `labels` has `labels_per_class` images."""
    present, counts = np.unique(labels, return_counts=True)
    fewest = int(counts.argmin())
    if counts[fewest] < labels_per_class:
        raise ConfigError(
            f"labels_per_class is {labels_per_class} and class {classes[present[fewest]]!r} has {counts[fewest]} "
            "labelled training images",
            f"use at most {counts[fewest]}",
        )


def draw_images(labels: Indices, labels_per_class: int, seed: int, draw: int) -> Indices:
    """Indices of `labels_per_class` images of each class, sorted: a function of (seed, draw)."""
    order = permutation(seed, draw + 1, len(labels), Purpose.SUBSET)
    chosen = [order[labels[order] == label][:labels_per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))
