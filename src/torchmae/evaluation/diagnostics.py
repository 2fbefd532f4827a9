"""Diagnostics of the features while a model trains: kNN, a linear probe, the effective rank."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from torchmae.config import EvalConfig
from torchmae.data.loader import ImageLoader, Indices, mixed_subset
from torchmae.evaluation import linear
from torchmae.evaluation.images import EVAL_BATCH, fixed_rows, read_batches, rows_with_label
from torchmae.evaluation.knn import knn_accuracy
from torchmae.evaluation.scores import Labelled, majority
from torchmae.evaluation.sharing import share
from torchmae.evaluation.subject import Subject, extract
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.training.runtime import Runtime

_TIMED = 16  # images whose encoding is timed


def encoding_time(model: MaskedAutoencoder, loader: ImageLoader, runtime: Runtime) -> float:
    """Seconds that this rank takes to encode one whole image."""
    (batch,) = loader.eval_batches(mixed_subset(len(loader), _TIMED), _TIMED)
    start = 0.0
    with torch.no_grad(), runtime.autocast():
        for _ in range(2):  # the first is a warm-up
            start = time.perf_counter()
            model.eval().encode(batch.images).sum().item()  # waits for the device
    return (time.perf_counter() - start) / len(batch.images)


class FeatureProbe:
    """kNN and a linear probe on one fixed choice of labelled images, as often as a training run asks for them."""

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

    def run(self, subject: Subject, runtime: Runtime) -> dict[str, float]:
        """Accuracies on the held-out images in percent, and of a model also the `effective_rank` of their features.

        knn: 20 neighbours vote (`knn.classify`). linear: a logistic regression with C = 0.1, the "linear_c0.1" of
        `torchmae evaluate`; it takes 0.2 s for 2,000 images with 192 values on two cores. All ranks call this
        together; each encodes a share of the images, and all get the figures.
        """
        found = []
        for loader, rows in ((self._train, self._train_rows), (self._val, self._val_rows)):
            mine = share(rows, EVAL_BATCH, runtime.ranks)
            found.append(extract(subject, read_batches(loader, mine.rows), runtime, share=mine))
        train, val = found
        figures = {"knn": knn_accuracy(*train, *val)}
        if self._linear_train:
            few = torch.from_numpy(fixed_rows(len(train.labels), self._linear_train)).to(train.labels.device)
            some = Labelled(train.features[few], train.labels[few])
            num_classes = 1 + int(max(train.labels.max(), val.labels.max()))
            guesses = linear.classify(some, val, num_classes, c=linear.FIXED_C)[:, 0]
            figures["linear"] = 100.0 * (guesses == val.labels).sum().item() / len(val.labels)
        if subject.model is not None and len(val.features) > 1:
            figures["effective_rank"] = effective_rank(val.features)
        return figures

    def majority(self) -> dict[str, float]:
        """majority: percent of the held-out images in the commonest training class; majority_images: their number."""
        assert self._train.labels is not None and self._val.labels is not None
        val = self._val.labels[self._val_rows]
        share = majority(self._train.labels[self._train_rows], val)[1]
        return {"majority": share, "majority_images": float(len(val))}


def effective_rank(features: Tensor) -> float:
    """Effective rank of (N, D) features, N 2 or more: exp of the entropy of their normalised singular values.

    It lies between 1 and min(N - 1, D), and is 0 where all rows are equal. Features that collapse onto a few directions
    may keep a low loss for a while, but this figure falls at once. Source: Roy and Vetterli 2007; for learned features
    Garrido et al. 2023 (RankMe). Here features are centred first, so that what all images share does not count.
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
    """At most `count` images with a label, the same in every run."""
    known = rows_with_label(loader.labels)
    return known[fixed_rows(len(known), count)]
