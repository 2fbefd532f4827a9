"""`Method`, a row of `torchmae evaluate`'s methods, and `Bench`, the data and features that methods share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchmae.config.evaluate import ComputeOptions, EvaluateOptions
from torchmae.data.loader import Indices, one_line_when_a_worker_ends
from torchmae.errors import ConfigError
from torchmae.evaluation.images import EvaluationData, ImageSet, ModelInput
from torchmae.evaluation.scores import Labelled, Result, join, over_draws, score
from torchmae.evaluation.sharing import WHOLE, Parts
from torchmae.evaluation.subject import RANDOM, Subject, encode
from torchmae.paths import user_path
from torchmae.random import Purpose, permutation
from torchmae.report.panels import Look
from torchmae.training.progress import Display
from torchmae.training.ranks import open_ranks
from torchmae.training.runtime import Runtime, callers_state, open_runtime

Classify = Callable[..., dict[str, Tensor]]
"""From training and test features (`Labelled`) and the number of classes to rankings of `scores.rank` by name."""


@contextmanager
def opened(compute: ComputeOptions, kept: str) -> Iterator[tuple[Runtime, Display]]:
    """Runtime and display of a command; `kept` tells the user how to go on after a lost rank."""
    with (
        callers_state(),
        open_ranks(compute.device, compute.rank_timeout, kept) as ranks,
        one_line_when_a_worker_ends(),
        closing(Display(compute.progress if ranks.is_main else "none")) as display,
    ):
        yield open_runtime(compute.device, compute.precision, compute.threads, ranks), display


@dataclass
class Bench:
    """Data, a place to compute, and a cache of features: each subject encodes each image once, shared among ranks.

    Each rank keeps the features of its training images, and of all test images.

    `run` is what the user evaluates: a folder, "random" or "pixels". `mask_ratio` is that of the model's training,
    `look` how its samples are drawn.
    """

    data: EvaluationData
    runtime: Runtime
    display: Display
    run: str
    mask_ratio: float = 0.75
    look: Look = field(default_factory=Look)
    _cache: dict[tuple[str, str], tuple[Tensor, ...]] = field(default_factory=dict)

    def probe(
        self, subject: Subject, pool: str, classify: Classify, options: EvaluateOptions, *, by_parts: bool = False
    ) -> Result:
        """`scores.score` of each ranking that `classify` gives of the test images; few-shot, `over_draws` of them.

        `by_parts`: `classify` takes this rank's part of the training features, and `Parts` as a fourth argument.
        """
        (train, rows), (test, _) = (self.features(subject, split, pool) for split in ("train", "test"))
        classes, groups = self.data.classes, self.data.train.groups
        parts = Parts(None if groups is None else groups.to(rows.device)[rows], self.runtime.ranks)
        if options.labels_per_class is None:
            given = (train, test, len(classes), parts) if by_parts else (parts.whole(train), test, len(classes))
            guesses = classify(*given)
            return join(score(name, ranking, test.labels, classes) for name, ranking in guesses.items())
        draws = []
        check_counts(parts.ranks.gather_rows(train.labels).cpu().numpy(), classes, options.labels_per_class)
        for few, of_few in draws_of(train, options.labels_per_class, options.draws, options.seed, parts):
            guesses = classify(few, test, len(classes), *([of_few] if by_parts else []))
            figures = join(score(name, ranking, test.labels, classes) for name, ranking in guesses.items()).figures
            draws.append({name: value for name, value in figures.items() if name.removesuffix("_macro") in guesses})
        return over_draws(draws, draws[0])

    def features(self, subject: Subject, split: str, pool: str) -> tuple[Labelled, Tensor]:
        """Features and labels of a split, and which images these are; of "train" this rank's, of "test" all.

        Labels of images of several classes each are (N, C) tags.
        """
        widest = subject.pools[-1]  # "both" holds the other two: one pass over the images serves all three
        if (subject.name, split) not in self._cache:
            images: ImageSet = getattr(self.data, split)
            share, batches = images.shared(self.runtime.ranks, f"encoding {split} images, {subject.name}")
            tags = images.source.tags
            if tags is not None:
                batches = (replace(item, labels=torch.from_numpy(tags[item.indices])) for item in batches)
            kept = share.of_this_rank if split == "train" else share.of_all_images
            encoded = encode(subject, batches, self.runtime, widest)
            features, labels, rows = kept(*encoded)
            self._cache[subject.name, split] = features, labels.to(features.device), rows
        features, labels, rows = self._cache[subject.name, split]
        if pool != widest:
            width = features.shape[1] // 2
            features = features[:, :width] if pool == "mean" else features[:, width:]
        return Labelled(features, labels), rows


_NEEDS = {
    "model": ("network", "evaluate a run, or random with --preset"),
    "tokens": ("patch tokens", "evaluate a vit model, or use knn or linear"),
}


@dataclass(frozen=True)
class Method:
    """A row of `methods.METHODS`.

    Attributes:
        measure: from images, a subject and the options to figures.
        needs: "features" (any subject), "model" (trained or not) or "tokens" (a model with patches).
        labelled: take only images with a label, of at least two classes.
        beside: the baselines of `--method all`: "random", "pixels". Empty: "all" does not include the method.
        compared: the baselines when the method is asked for alone.
        left_out: a sentence on why "all" leaves the method, or one of its baselines, out of this evaluation; empty
            where it does not.
        open: opens the images; None: `images.open_evaluation_data`.
        several: `measure` for images of several classes each; None: the method cannot measure them.
    """

    measure: Callable[[Bench, Subject, EvaluateOptions], Result]
    needs: Literal["features", "model", "tokens"] = "features"
    labelled: bool = True
    beside: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()
    left_out: Callable[[Bench, Subject, EvaluateOptions], str] = lambda *_: ""
    open: Callable[[EvaluateOptions, ModelInput], EvaluationData] | None = None
    several: Callable[[Bench, Subject, EvaluateOptions], Result] | None = None

    def baselines(self, options: EvaluateOptions) -> tuple[str, ...]:
        """The names of what is measured beside the run."""
        return self.beside if options.with_baselines else self.compared

    def suits(self, subject: Subject) -> bool:
        """Whether the method can measure the subject."""
        return {"model": subject.model is not None, "tokens": subject.has_tokens}.get(self.needs, True)

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


def draws_of(
    train: Labelled, labels_per_class: int, draws: int, seed: int, parts: Parts = WHOLE
) -> Iterator[tuple[Labelled, Parts]]:
    """`labels_per_class` images of each class, `draws` times, all of them on every rank."""
    labels, groups = parts.ranks.gather_rows(train.labels).cpu().numpy(), parts.all_groups()
    for draw in range(draws):
        chosen = draw_images(labels, labels_per_class, seed, draw, groups)
        mine = parts.of_this_rank(chosen, len(train.labels)).to(train.labels.device)
        few = parts.whole(Labelled(train.features[mine], train.labels[mine]))
        yield few, Parts(None if groups is None else torch.from_numpy(groups[chosen]).to(mine.device))


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


def draw_images(
    labels: Indices, labels_per_class: int, seed: int, draw: int, groups: npt.NDArray[Any] | None = None
) -> Indices:
    """Sorted indices of `labels_per_class` images of each class: a function of (seed, draw).

    With `groups`, those of a class are of as many groups as can be: ten frames of a patient are not ten labels.
    """
    order = permutation(seed, draw + 1, len(labels), Purpose.SUBSET)
    if groups is not None:
        seen: Counter[Any] = Counter()
        turn = np.zeros(len(order), dtype=np.int64)  # how many images of the same group and class come before
        for place, pair in enumerate(zip(groups[order].tolist(), labels[order].tolist(), strict=True)):
            turn[place] = seen[pair]
            seen[pair] += 1
        order = order[np.argsort(turn, kind="stable")]
    chosen = [order[labels[order] == label][:labels_per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))
