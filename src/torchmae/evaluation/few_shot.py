"""Few-shot: a few training images of each class, drawn several times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from torchmae.errors import ConfigError
from torchmae.evaluation.scores import Labelled
from torchmae.random import Purpose, permutation


def draws_of(train: Labelled, labels_per_class: int, draws: int, seed: int) -> Iterator[Labelled]:
    """`labels_per_class` images of each class, `draws` times."""
    labels = train.labels.cpu().numpy()
    for draw in range(draws):
        chosen = torch.from_numpy(draw_images(labels, labels_per_class, seed, draw)).to(train.labels.device)
        yield Labelled(train.features[chosen], train.labels[chosen])


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
