"""From predicted classes to figures: top-1, top-5, each class, confusions, and how sure the figure is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchmae.data.loader import Indices

TOP = 5
CONFIDENCE = 0.95
MAX_CONFUSION_CLASSES = 100
_SHARD = re.compile(r"(?:[a-z]+[-_ ]?)?(?:\d+|[0-9a-f]{2})", re.IGNORECASE)  # names of folders that may be shards


class Labelled(NamedTuple):
    """Features of labelled images, on one device.

    Attributes:
        features: (N, D) float32.
        labels: (N,) int64, 0 to the number of classes - 1.
    """

    features: Tensor
    labels: Tensor


class Result(NamedTuple):
    """What one method says of one subject.

    Attributes:
        figures: name to number; accuracies in percent.
        details: what is behind them, as JSON values.
        notes: what a reader of the figures should know, a sentence each.
    """

    figures: dict[str, float]
    details: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """How well a classifier did.

    Attributes:
        top1: share of images whose first guess is right, in percent.
        top5: share with the right class among the first five; None with five classes or fewer.
        low: lower end of the 95% confidence interval of top1.
        high: upper end.
        per_class: (C,) share right among the images of each class, NaN for a class without any.
        counts: (C,) images of each class.
        confusion: (C, C) images of the row's class that were taken for the column's.
    """

    top1: float
    top5: float | None
    low: float
    high: float
    per_class: Tensor
    counts: Tensor
    confusion: Tensor

    def figures(self, name: str) -> dict[str, float]:
        """`name`, `name`_top5, `name`_low and `name`_high."""
        top5 = {} if self.top5 is None else {f"{name}_top5": self.top5}
        return {name: self.top1, **top5, f"{name}_low": self.low, f"{name}_high": self.high}

    def details(self, classes: Sequence[str]) -> dict[str, Any]:
        """The table of classes and, up to `MAX_CONFUSION_CLASSES` of them, the confusion matrix, as JSON values."""
        per_class = [
            {"class": name, "images": count, "top1": None if math.isnan(share) else share}
            for name, count, share in zip(classes, self.counts.tolist(), self.per_class.tolist(), strict=True)
        ]
        small = len(classes) <= MAX_CONFUSION_CLASSES
        return {"per_class": per_class, "confusion": self.confusion.tolist() if small else None}


def rank(votes: Tensor) -> Tensor:
    """(M, C) votes or logits to (M, min(C, 5)) classes, the likeliest first."""
    return votes.topk(min(votes.shape[1], TOP), dim=1).indices


def score(ranking: Tensor, labels: Tensor, num_classes: int) -> Scores:
    """Scores of ranked guesses.

    Args:
        ranking: (M, at most 5) classes, the likeliest first, as `rank` gives them.
        labels: (M,) int64, the right ones.
        num_classes: C, above every label and every guess.
    """
    ranking, labels = ranking.cpu(), labels.cpu()
    right = ranking == labels[:, None]
    confusion = torch.bincount(labels * num_classes + ranking[:, 0], minlength=num_classes**2)
    confusion = confusion.view(num_classes, num_classes)
    counts = confusion.sum(1)
    correct = int(right[:, 0].sum())
    low, high = bootstrap_interval(correct, len(labels))
    return Scores(
        top1=100 * correct / len(labels),
        top5=100 * right.any(1).double().mean().item() if num_classes > TOP else None,
        low=100 * low,
        high=100 * high,
        per_class=100 * confusion.diagonal().double() / counts,
        counts=counts,
        confusion=confusion,
    )


def majority(train: Indices, test: Indices) -> tuple[int, float]:
    """The commonest class of the training labels, and the share of test labels that are of it, in percent."""
    commonest = int(np.bincount(train).argmax())
    return commonest, 100.0 * float((test == commonest).mean())


def chance_note(figures: Mapping[str, float], train: Indices, test: Indices, classes: Sequence[str]) -> tuple[str, ...]:
    """A note where no accuracy is surely above that of always answering the commonest class.

    Args:
        figures: as `Scores.figures` gives them; others are passed over.
        train: labels of the training images.
        test: labels of the test images.
        classes: the name of each.
    """
    lowest = [figures[f"{name}_low"] for name in figures if f"{name}_low" in figures]
    commonest, share = majority(train, test)
    if not lowest or max(lowest) > share:
        return ()
    doubt = ""
    if all(map(_SHARD.fullmatch, classes)):
        doubt = f"; are {', '.join(classes[:3])} classes, or shards of one set of images?"
    return (f"no better than always answering {classes[commonest]!r} ({share:.1f}%), within chance{doubt}",)


def exact(tensor: Tensor) -> Tensor:
    """In double precision, on the tensor's device or, where that has none (MPS), on the processor."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def bootstrap_interval(correct: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Percentile bootstrap interval of a share (Efron 1979), without the resampling.

    Drawing `count` of `count` right or wrong answers with replacement gives a binomial number of right ones, so the
    interval that ever more resamples would tend to is known, and there is nothing to seed.

    Args:
        correct: right answers.
        count: all answers, at least 1.
        confidence: in (0, 1).

    Returns:
        lower and upper end, in [0, 1].
    """
    share = torch.tensor(correct / count, dtype=torch.float64)
    k = torch.arange(count + 1, dtype=torch.float64)
    total = torch.tensor(float(count), dtype=torch.float64)
    choices = torch.lgamma(total + 1) - torch.lgamma(k + 1) - torch.lgamma(total - k + 1)
    probability = torch.exp(choices + torch.special.xlogy(k, share) + torch.special.xlogy(total - k, 1 - share))
    tail = (1 - confidence) / 2
    ends = torch.searchsorted(probability.cumsum(0), torch.tensor([tail, 1 - tail], dtype=torch.float64))
    low, high = (min(end, count) / count for end in ends.tolist())
    return low, high


def combine(scores: Mapping[str, Scores], classes: Sequence[str]) -> Result:
    """One result of several classifiers' scores."""
    figures = {key: value for name, item in scores.items() for key, value in item.figures(name).items()}
    return Result(figures, {name: item.details(classes) for name, item in scores.items()})


def num_classes_of(*sets: Labelled) -> int:
    """One more than the largest label."""
    return 1 + max(int(item.labels.max()) for item in sets)
