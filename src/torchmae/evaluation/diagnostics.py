"""Is training healthy, and are the features of any use? What the loss does not tell, measured on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from torchmae.config import EvalConfig
from torchmae.data.loader import Batch, ImageLoader, Indices
from torchmae.evaluation import linear
from torchmae.evaluation.features import extract, pixels
from torchmae.evaluation.images import fixed_rows, rows_with_label
from torchmae.evaluation.knn import knn_accuracy
from torchmae.evaluation.scores import Labelled, majority, num_classes_of
from torchmae.evaluation.sharing import share
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.training.ranks import ALONE, Ranks
from torchmae.training.runtime import Runtime

BATCH = 250


class FeatureProbe:
    """The same labelled images, without augmentation, looked at again and again while a model trains.

    Args:
        train: the training images.
        val: the held-out images.
        config: how many of each.
    """

    def __init__(self, train: ImageLoader, val: ImageLoader, config: EvalConfig) -> None:
        self._train, self._val = train, val
        self._train_rows = _labelled(train, config.knn_train)
        self._val_rows = _labelled(val, config.knn_val)
        self._linear_train = config.linear_train

    @property
    def is_possible(self) -> bool:
        """Whether there are held-out images with a label, and training images of two classes."""
        if self._train.labels is None or not len(self._val_rows):
            return False
        return len(np.unique(self._train.labels[self._train_rows])) > 1

    def run(self, model: MaskedAutoencoder, runtime: Runtime) -> dict[str, float]:
        """knn and linear, as `class_figures` has them, and the effective_rank of the held-out images' features.

        Of several ranks, all call this, each encodes a share of the images, and all get the figures.
        """

        def encode(batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
            return extract(model, batches, runtime)

        train, val = self._features(encode, runtime.ranks)
        rank = {"effective_rank": effective_rank(val.features)} if len(val.features) > 1 else {}
        return {**class_figures(train, val, self._linear_train), **rank}

    def run_on_pixels(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """knn and linear of the images themselves, the baseline that a model has to beat."""
        return class_figures(*self._features(pixels, ranks), self._linear_train)

    def majority(self) -> dict[str, float]:
        """majority: percent of the held-out images that are of the commonest class; majority_images: of how many."""
        assert self._train.labels is not None and self._val.labels is not None
        val = self._val.labels[self._val_rows]
        share = majority(self._train.labels[self._train_rows], val)[1]
        return {"majority": share, "majority_images": float(len(val))}

    def _features(
        self, encode: Callable[[Iterable[Batch]], tuple[Tensor, Tensor]], ranks: Ranks
    ) -> tuple[Labelled, Labelled]:
        """Of the training and of the held-out images; each rank encodes a share of them."""
        found = []
        for loader, rows in ((self._train, self._train_rows), (self._val, self._val_rows)):
            mine = share(rows, BATCH, ranks)
            features, labels = mine.of_all_images(*encode(loader.eval_batches(mine.rows, BATCH)))
            known = labels >= 0  # but for an unreadable image whose stand-in has no label
            found.append(Labelled(features[known], labels[known]))
        train, val = found
        return train, val


def class_figures(train: Labelled, val: Labelled, linear_train: int) -> dict[str, float]:
    """Two quick measures of how well features tell classes apart, in percent of `val`.

    Args:
        train: what is learned from.
        val: what is classified.
        linear_train: images of `train` that the linear probe learns from, at most; 0: there is no linear probe.

    Returns:
        knn: 20 neighbours vote (see `knn.knn_predict`). linear: a logistic regression with C = 0.1 on standardised
        features, the "linear_c0.1" of `torchmae evaluate`, fitted to its optimum; of 2,000 images with 192 values it
        takes 0.2 s on two cores.
    """
    figures = {"knn": knn_accuracy(*train, *val)}
    if linear_train:
        rows = torch.from_numpy(fixed_rows(len(train.labels), linear_train)).to(train.labels.device)
        some = Labelled(train.features[rows], train.labels[rows])
        guesses = linear.classify(some, val, num_classes_of(train, val), c=linear.FIXED_C)[:, 0]
        figures["linear"] = 100.0 * (guesses == val.labels).sum().item() / len(val.labels)
    return figures


def effective_rank(features: Tensor) -> float:
    """How many directions features really use: exp of the entropy of their normalised singular values.

    Features that collapse onto a few directions keep a low loss for a while, but no longer tell images apart; this
    figure falls at once. It is a number of directions: between 1 and min(N - 1, D), and D only where every direction
    carries the same weight. Source: Roy and Vetterli 2007, "The effective rank"; as a measure of learned features
    Garrido et al. 2023 (RankMe). Unlike there, features are centred: what all images share does not count.

    Args:
        features: (N, D), N 2 or more.

    Returns:
        0 when all rows are the same.
    """
    assert features.ndim == 2 and len(features) >= 2
    rows = features.detach().cpu().double()
    size = rows.abs().max()
    singular = torch.linalg.svdvals(rows - rows.mean(0))
    # Rows that differ by rounding errors alone do not differ.
    if not singular[0] > 1e-6 * size:
        return 0.0
    share = singular / singular.sum()
    return torch.special.entr(share).sum().exp().item()


def _labelled(loader: ImageLoader, count: int) -> Indices:
    """At most `count` images with a label: the same ones in every run."""
    known = rows_with_label(loader.labels)
    return known[fixed_rows(len(known), count)]
