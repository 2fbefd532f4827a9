"""Diagnostics of the features while a model trains: kNN, a linear probe, the effective rank."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchmae.config import EvalConfig
from torchmae.data.loader import ImageLoader, Indices, mixed_subset
from torchmae.evaluation import linear
from torchmae.evaluation.images import EVAL_BATCH, fixed_rows, read_batches, rows_with_label
from torchmae.evaluation.knn import classify
from torchmae.evaluation.scores import Labelled, majority
from torchmae.evaluation.sharing import Parts, share
from torchmae.evaluation.subject import Subject, encode
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.training.runtime import Runtime

NEIGHBOURS = 20
KEPT = 1000  # images of each split whose features are kept for pictures
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


class Seen(NamedTuple):
    """Features and labels of some images, and which images these are, on every rank."""

    features: Tensor
    labels: Tensor
    rows: Indices


def _some(images: Labelled, rows: Tensor, parts: Parts) -> Seen:
    """Of at most `KEPT` of all ranks' images."""
    count = len(parts.ranks.gather_rows(rows))
    few = parts.of_this_rank(fixed_rows(count, KEPT), len(rows)).to(rows.device)
    features, labels, chosen = (parts.ranks.gather_rows(values[few]) for values in (*images, rows))
    return Seen(features, labels, chosen.cpu().numpy())


class FeatureProbe:
    """kNN and a linear probe on one fixed choice of labelled images, as often as a training run asks for them."""

    def __init__(self, train: ImageLoader, val: ImageLoader, config: EvalConfig) -> None:
        self._train, self._val = train, val
        self._train_rows = _labelled(train, config.knn_train)
        self._val_rows = _labelled(val, config.knn_val)
        self._linear_train = config.linear_train
        self.seen: tuple[int, dict[str, Seen]] = -1, {}  # a step, and features after it, by split

    @property
    def is_possible(self) -> bool:
        """Whether there are held-out images with a label, and training images of two classes."""
        if self._train.labels is None or not len(self._val_rows):
            return False
        return len(np.unique(self._train.labels[self._train_rows])) > 1

    def run(self, subject: Subject, runtime: Runtime, step: int = 0) -> dict[str, float]:
        """Accuracies on the held-out images in percent, and of a model also the `effective_rank` of their features.

        knn: 20 neighbours vote (`knn.classify`). linear: a logistic regression with C = 0.1, the "linear_c0.1" of
        `torchmae evaluate`; it takes 0.2 s for 2,000 images with 192 values on two cores. All ranks call this
        together; each encodes a share of the images, and all get the figures. Some features of a model are kept in
        `seen`, with the `step` of its training.
        """
        parts, found = Parts(ranks=runtime.ranks), []
        for loader, rows in ((self._train, self._train_rows), (self._val, self._val_rows)):
            mine = share(rows, EVAL_BATCH, runtime.ranks)
            kept = mine.of_this_rank if loader is self._train else mine.of_all_images
            found.append(kept(*encode(subject, read_batches(loader, mine.rows), runtime)))
        (*of_train, train_rows), (*of_val, val_rows) = found
        train, val = Labelled(*of_train), Labelled(*of_val)
        all_labels = parts.ranks.gather_rows(train.labels)
        num_classes = 1 + int(max(all_labels.max(), val.labels.max()))
        guesses = {"knn": classify(train, val, num_classes, parts, ks=(NEIGHBOURS,))[f"knn{NEIGHBOURS}"]}
        if self._linear_train:
            few = parts.of_this_rank(fixed_rows(len(all_labels), self._linear_train), len(train.labels))
            some = Labelled(*(values[few.to(values.device)] for values in train))
            guesses["linear"] = linear.classify(some, val, num_classes, parts, c=linear.FIXED_C)
        right = {name: int((ranking[:, 0] == val.labels).sum()) for name, ranking in guesses.items()}
        figures = {name: 100.0 * number / len(val.labels) for name, number in right.items()}
        if subject.model is not None:
            self.seen = step, {"train": _some(train, train_rows, parts), "val": _some(val, val_rows, Parts())}
            if len(val.features) > 1:
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
