"""From predicted classes to figures: top-1, top-5, each class, confusions, and how sure the figure is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist, mean, stdev
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


def join(results: Iterable[Result]) -> Result:
    """Several results as one."""
    joined = Result({}, {})
    for item in results:
        joined = Result(joined.figures | item.figures, joined.details | item.details, joined.notes + item.notes)
    return joined


def rank(votes: Tensor) -> Tensor:
    """(M, C) votes or logits to (M, min(C, 5)) classes, the likeliest first."""
    return votes.topk(min(votes.shape[1], TOP), dim=1).indices


def score(name: str, ranking: Tensor, labels: Tensor, classes: Sequence[str]) -> Result:
    """How well a classifier did.

    Args:
        name: of the figure.
        ranking: (M, at most 5) classes, the likeliest first, as `rank` gives them.
        labels: (M,) int64, the right ones.
        classes: the name of each class.

    Returns:
        figures, in percent: NAME, the share of images whose first guess is right; with more than five classes
        NAME_top5, that with the right class among the first five; NAME_low and NAME_high, the ends of the 95% interval
        of NAME. details, under NAME: the images and the share right of each class, and up to `MAX_CONFUSION_CLASSES` of
        them the confusion matrix (rows are the right classes).
    """
    ranking, labels, num_classes = ranking.cpu(), labels.cpu(), len(classes)
    right = ranking == labels[:, None]
    counts = torch.bincount(labels, minlength=num_classes).tolist()
    right_counts = torch.bincount(labels[right[:, 0]], minlength=num_classes).tolist()
    confusion = None
    if num_classes <= MAX_CONFUSION_CLASSES:
        pairs = torch.bincount(labels * num_classes + ranking[:, 0], minlength=num_classes**2)
        confusion = pairs.view(num_classes, num_classes).tolist()
    figures = {name: 100 * sum(right_counts) / len(labels)}
    if num_classes > TOP:
        figures[f"{name}_top5"] = 100 * right.any(1).double().mean().item()
    figures[f"{name}_low"], figures[f"{name}_high"] = (
        100 * end for end in wilson_interval(sum(right_counts), len(labels))
    )
    per_class = [
        {"class": word, "images": count, "top1": 100 * correct / count if count else None}
        for word, count, correct in zip(classes, counts, right_counts, strict=True)
    ]
    return Result(figures, {name: {"per_class": per_class, "confusion": confusion}})


def majority(train: Indices, test: Indices) -> tuple[int, float]:
    """The commonest class of the training labels, and the share of test labels that are of it, in percent."""
    commonest = int(np.bincount(train).argmax())
    return commonest, 100.0 * float((test == commonest).mean())


def chance_note(figures: Mapping[str, float], train: Indices, test: Indices, classes: Sequence[str]) -> tuple[str, ...]:
    """A note where no accuracy is surely above that of always answering the commonest class.

    Args:
        figures: as `score` gives them; others are passed over.
        train: labels of the training images.
        test: labels of the test images.
        classes: the name of each.
    """
    lowest = [figures[f"{name}_low"] for name in figures if f"{name}_low" in figures]
    if not lowest:
        return ()
    commonest, share = majority(train, test)
    if max(lowest) > share:
        return ()
    doubt = ""
    if all(map(_SHARD.fullmatch, classes)):
        doubt = f"; are {', '.join(classes[:3])} classes, or shards of one set of images?"
    return (f"no better than always answering {classes[commonest]!r} ({share:.1f}%), within chance{doubt}",)


def exact(tensor: Tensor) -> Tensor:
    """In double precision, on the tensor's device or, where that has none (MPS), on the processor."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson 1927), in [0, 1]; never a single point, also where all answers agree.

    Args:
        correct: right answers.
        count: all answers, at least 1.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share = correct / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / (1 + z**2 / count)
    return max(min(centre - half, share), 0.0), min(max(centre + half, share), 1.0)


def over_draws(draws: Sequence[Mapping[str, float]], accuracies: Sequence[str]) -> Result:
    """Figures of several draws of training images as their means.

    Of `accuracies` also the deviation of a sample (0 for one draw), as NAME_std, and as details the value of each draw.
    """
    figures = {name: mean(figures[name] for figures in draws) for name in draws[0]}
    values = {name: [figures[name] for figures in draws] for name in accuracies}
    for name, found in values.items():
        figures[f"{name}_std"] = stdev(found) if len(found) > 1 else 0.0
    return Result(figures, {name: {"draws": found} for name, found in values.items()})
