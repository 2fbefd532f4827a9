"""`Method`, a row of `torchmae evaluate`'s methods, and `Bench`, the data and features that methods share."""

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
from torchmae.report.panels import Look
from torchmae.training.progress import Display
from torchmae.training.ranks import one_line_when_lost, open_ranks
from torchmae.training.runtime import Runtime, open_runtime
from torchmae.training.task import callers_state

Classify = Callable[[Labelled, Labelled, int], dict[str, Tensor]]
"""From training and test features and the number of classes to rankings of `scores.rank` by name."""


@contextmanager
def opened(compute: ComputeOptions, kept: str) -> Iterator[tuple[Runtime, Display]]:
    """Runtime and display of a command; `kept` tells the user how to go on after a lost rank."""
    with (
        callers_state(),
        open_ranks(compute.device) as ranks,
        one_line_when_lost(ranks, kept),
        one_line_when_a_worker_ends(),
        closing(Display(compute.progress if ranks.is_main else "none")) as display,
    ):
        yield open_runtime(compute.device, compute.precision, compute.threads, ranks), display


@dataclass
class Bench:
    """Data, a place to compute, and a cache of features: each subject encodes each image once, shared among ranks.

    `run` is what the user evaluates: a folder, "random" or "pixels". `mask_ratio` is that of the model's training,
    `look` how its samples are drawn.
    """

    data: EvaluationData
    runtime: Runtime
    display: Display
    run: str
    mask_ratio: float = 0.75
    look: Look = field(default_factory=Look)
    _cache: dict[tuple[str, str], Labelled] = field(default_factory=dict)

    def probe(self, subject: Subject, pool: str, classify: Classify, options: EvaluateOptions) -> Result:
        """`scores.score` of each ranking that `classify` gives of the test images; few-shot, `over_draws` of them."""
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
        return over_draws(draws, draws[0])

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
        measure: from images, a subject and the options to figures.
        needs: "features" (any subject), "model" (trained or not), "tokens" (a model with patches) or "training" (a
            trained model).
        labelled: take only images with a label, of at least two classes.
        beside: the baselines of `--method all`: "random", "pixels". Empty: "all" does not include the method.
        compared: the baselines when the method is asked for alone.
        left_out: a sentence on why "all" leaves the method, or one of its baselines, out of this evaluation; empty
            where it does not.
        open: opens the images; None: `images.open_evaluation_data`.
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
        """Whether the method can measure the subject."""
        is_model = subject.model is not None
        found = {"model": is_model, "tokens": subject.has_tokens, "training": is_model and subject.name != RANDOM}
        return found.get(self.needs, True)

    def check(self, name: str, subject: Subject, run: str) -> None:
        """ConfigError unless the method suits the subject; `name` and `run` are the user's words for the two."""
        if not self.suits(subject):
            what, fix = _NEEDS[self.needs]
            raise ConfigError(f"{run!r} has no {what}, which method {name!r} needs", fix)


def chosen_pools(subject: Subject, options: EvaluateOptions, default: Sequence[str]) -> Sequence[str]:
    """The pool of the options, else the default, and "mean" for pixels; ConfigError for a model without this pool."""
    if options.pool is None:
        return default
    if options.pool in subject.pools:
        return (options.pool,)
    if subject.model is None:
        return ("mean",)
    raise ConfigError(f"pool is {options.pool!r} but the model has no class token", "use --pool mean")


def output_folder(run: str, options: EvaluateOptions) -> Path:
    """The option `out`, else the run's folder; ConfigError where neither exists."""
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
    """Sorted indices of `labels_per_class` images of each class: a function of (seed, draw)."""
    order = permutation(seed, draw + 1, len(labels), Purpose.SUBSET)
    chosen = [order[labels[order] == label][:labels_per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))
