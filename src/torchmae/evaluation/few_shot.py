"""Few-shot: a probe that learns from a few images of each class, and how much depends on which."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchmae.errors import ConfigError
from torchmae.evaluation.scores import Labelled, Result, score
from torchmae.random import Purpose, permutation

Classify = Callable[[Labelled, Labelled, int], dict[str, Tensor]]
"""From training and test features and the number of classes to ranked guesses by name."""


def run(
    train: Labelled,
    test: Labelled,
    classify: Classify,
    *,
    classes: Sequence[str],
    labels_per_class: int,
    draws: int = 5,
    seed: int = 0,
) -> dict[str, float]:
    """The figures of `measure` alone; arguments as there."""
    return measure(
        train, test, classify, classes=classes, labels_per_class=labels_per_class, draws=draws, seed=seed
    ).figures


def measure(
    train: Labelled,
    test: Labelled,
    classify: Classify,
    *,
    classes: Sequence[str],
    labels_per_class: int,
    draws: int = 5,
    seed: int = 0,
) -> Result:
    """Mean and deviation of a probe's accuracy over several draws of its training images.

    Args:
        train: what is drawn from.
        test: what is classified, all of it each time.
        classify: the probe.
        classes: the name of each label.
        labels_per_class: images drawn of each class that `train` has.
        draws: at least 1.
        seed: of the draws.

    Returns:
        figures: for each of the probe's, the mean of its top-1 in percent, and with _std the deviation (of a sample;
        0 for one draw). details: the top-1 of each draw.

    Raises:
        ConfigError: a class has fewer images.
    """
    labels = train.labels.cpu().numpy()
    check_counts(labels, classes, labels_per_class)
    shares: dict[str, list[float]] = {}
    for draw in range(draws):
        chosen = torch.from_numpy(draw_images(labels, labels_per_class, seed, draw)).to(train.labels.device)
        few = Labelled(train.features[chosen], train.labels[chosen])
        for name, ranking in classify(few, test, len(classes)).items():
            shares.setdefault(name, []).append(score(ranking, test.labels, len(classes)).top1)
    figures: dict[str, float] = {}
    for name, values in shares.items():
        figures[name] = float(np.mean(values))
        figures[f"{name}_std"] = float(np.std(values, ddof=1)) if draws > 1 else 0.0
    return Result(figures, {name: {"draws": values} for name, values in shares.items()})


def check_counts(labels: npt.NDArray[np.int64], classes: Sequence[str], labels_per_class: int) -> None:
    """ConfigError unless every class among `labels` has `labels_per_class` images."""
    present, counts = np.unique(labels, return_counts=True)
    fewest = int(counts.argmin())
    if counts[fewest] < labels_per_class:
        raise ConfigError(
            f"labels_per_class is {labels_per_class} and class {classes[present[fewest]]!r} has {counts[fewest]} "
            "labelled training images",
            f"use at most {counts[fewest]}",
        )


def draw_images(labels: npt.NDArray[np.int64], labels_per_class: int, seed: int, draw: int) -> npt.NDArray[np.int64]:
    """Indices of `labels_per_class` images of each class, sorted: a function of (seed, draw)."""
    order = permutation(seed, draw + 1, len(labels), Purpose.SUBSET)
    chosen = [order[labels[order] == label][:labels_per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))
