"""From predicted classes to figures: top-1, top-5, accuracy of each class, confusions, confidence intervals."""

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
    """Features (N, D) float32 and labels (N,) int64 of images, on one device."""

    features: Tensor
    labels: Tensor


class Result(NamedTuple):
    """The outcome of one method for one subject: figures by name (accuracies in percent), JSON details, notes."""

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
    """Accuracies of a classifier, from (M, at most 5) classes of `rank` and the (M,) int64 labels.

    Figures in percent: NAME (top-1), NAME_low and NAME_high (its 95% interval), NAME_top5 with more than five classes,
    and, where some classes have more images than others, NAME_macro, the mean of the classes' own top-1. Details, under
    NAME: images and top-1 of each class, and for at most `MAX_CONFUSION_CLASSES` classes the confusion matrix, whose
    rows are the labels.
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
    low, high = wilson_interval(sum(right_counts), len(labels))
    figures |= {f"{name}_low": 100 * low, f"{name}_high": 100 * high}
    if len({count for count in counts if count}) > 1:
        shares = [correct / count for correct, count in zip(right_counts, counts, strict=True) if count]
        figures[f"{name}_macro"] = 100 * mean(shares)
    per_class = [
        {"class": word, "images": count, "top1": 100 * correct / count if count else None}
        for word, count, correct in zip(classes, counts, right_counts, strict=True)
    ]
    return Result(figures, {name: {"per_class": per_class, "confusion": confusion}})


def majority(train: Indices, test: Indices) -> tuple[int, float]:
    """The commonest class of the training labels, and its share of the test labels in percent."""
    commonest = int(np.bincount(train).argmax())
    return commonest, 100.0 * float((test == commonest).mean())


def chance_note(figures: Mapping[str, float], train: Indices, test: Indices, classes: Sequence[str]) -> tuple[str, ...]:
    """A note if no figure of `score` or `over_draws` is above the accuracy of always answering the commonest class.

    "Above" means that the whole interval is, or over draws the mean less two deviations; `train` and `test` are labels.
    """
    lowest = [figures[f"{name}_low"] for name in figures if f"{name}_low" in figures]
    lowest += [figures[name] - 2 * figures[f"{name}_std"] for name in figures if f"{name}_std" in figures]
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
    """In double precision, on the tensor's device, or on the CPU where the device has none (MPS)."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """The 95% score interval, in [0, 1], of `correct` out of `count` answers, 1 or more (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share = correct / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / (1 + z**2 / count)
    return max(min(centre - half, share), 0.0), min(max(centre + half, share), 1.0)


def over_draws(draws: Sequence[Mapping[str, float]], accuracies: Iterable[str]) -> Result:
    """Means of the figures of several draws of training images.

    For `accuracies`, NAME_std is the sample deviation, 0 for one draw, and the details have the value of each draw.
    """
    figures = {name: mean(draw[name] for draw in draws) for name in draws[0]}
    values = {name: [draw[name] for draw in draws] for name in accuracies}
    for name, found in values.items():
        figures[f"{name}_std"] = stdev(found) if len(found) > 1 else 0.0
    return Result(figures, {name: {"draws": found} for name, found in values.items()})
