"""What a run's figures say is wrong, in plain words and with what to do about it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torchmae.report.metrics import finite, number, percent

Records = Sequence[Mapping[str, Any]]

# Share of time spent waiting for data above which a faster reader is worth having.
_DATA_WAIT = 0.2
# A gradient norm so many times its usual value has left the range in which a step can be trusted.
_EXPLODING = 10.0
_FEWEST_RECORDS = 10
# Between two accuracies; less is put down to chance.
_STANDARD_ERRORS = 2.0
# Features that use fewer directions than this, or than this share of what they once used, have collapsed. On CIFAR-10
# a ViT of width 192 begins at 34 and ends at 50 to 60.
_COLLAPSED_RANK = 3.0
_COLLAPSED_SHARE = 0.25
# A step that changes the weights by about a thousandth is usual. The shipped recipes have medians of 0.2% to 0.6%.
_LARGE_UPDATE = 2e-2
_SMALL_UPDATE = 5e-5


def hints(records: Records) -> list[str]:
    """Everything that looks wrong, a sentence or two each; empty where nothing does.

    Args:
        records: the objects of metrics.jsonl, by rising step, or of any part of a run.
    """
    return [*filter(None, [loss_hint(records)]), *training_hints(records)]


def training_hints(records: Records) -> list[str]:
    """As `hints`, without the loss: for a page that weighs it elsewhere."""
    found = (
        collapse_hint(records),
        chance_hint(records),
        gradient_hint(records),
        update_hint(records),
        data_hint(records),
    )
    return [text for text in found if text]


def loss_hint(records: Records) -> str:
    """Whether the last loss on held-out images is no better than interpolation's; empty if it is."""
    loss, interpolation = _last(records, "val", "loss"), _last(records, "val", "loss_interpolation")
    if loss is None or interpolation is None or loss < interpolation:
        return ""
    return (
        f"The loss of {number(loss)} is no better than interpolating from what is visible ({number(interpolation)}): "
        "train longer, or try a higher learning rate."
    )


def collapse_hint(records: Records) -> str:
    """Whether the features use almost no directions any more, by "effective_rank"; empty if not, or not measured."""
    ranks = [*_values(records, "baseline", "effective_rank_untrained"), *_values(records, "val", "effective_rank")]
    if not _values(records, "val", "effective_rank"):
        return ""
    last, highest = ranks[-1], max(ranks)
    if last >= _COLLAPSED_RANK and last >= _COLLAPSED_SHARE * highest:
        return ""
    fell = f", down from {highest:.1f}" if highest > 1.1 * last else ""
    return (
        f"The features are collapsing: they use {last:.1f} directions in effect{fell}, so that images look alike to "
        "them. Lower the learning rate, or hide more."
    )


def chance_hint(records: Records) -> str:
    """Whether kNN is no better than always answering the commonest class; empty if it is, or was not measured."""
    knn, share = _last(records, "val", "knn"), _last(records, "baseline", "majority")
    images = _last(records, "baseline", "majority_images")
    if knn is None or share is None or not images:
        return ""
    if knn - share > _STANDARD_ERRORS * math.sqrt(max(share * (100 - share), 1.0) / images):
        return ""
    return (
        f"kNN classifies {knn:.1f}% of {images:,.0f} held-out images correctly, always answering the commonest class "
        f"{share:.1f}%: no difference. The labels may say nothing of the images, as folders that are mere shards do."
    )


def gradient_hint(records: Records) -> str:
    """Whether the gradient norm has left its range at the end; empty if not, or not measured often enough."""
    norms = _values(records, "train", "grad_norm")
    if len(norms) < _FEWEST_RECORDS:
        return ""
    usual, last = statistics.median(norms), max(norms[-3:])
    if last <= _EXPLODING * usual:
        return ""
    return (
        f"The gradient norm rose to {number(last)}, {last / max(usual, 1e-12):,.0f} times its median: lower the "
        "learning rate, or set --optim.clip_grad 1."
    )


def update_hint(records: Records) -> str:
    """Whether steps are far too large or too small for the weights; empty if not, or not measured often enough."""
    updates = _values(records, "train", "update_to_weight")
    if len(updates) < _FEWEST_RECORDS:
        return ""
    usual = statistics.median(updates)  # a schedule begins and ends at zero
    if _SMALL_UPDATE <= usual <= _LARGE_UPDATE:
        return ""
    advice = "a higher" if usual < _SMALL_UPDATE else "a lower"
    return (
        f"A step changes the weights by {usual:.1e} of their norm (median), where about 1e-3 is usual: try {advice} "
        "learning rate."
    )


def data_hint(records: Records) -> str:
    """Whether training waits for data for more than a fifth of the time; empty if not, or not measured."""
    # Starting workers is no lasting wait.
    waits = _values(records, "train", "data_wait")[1:]
    if not waits or (wait := sum(waits) / len(waits)) <= _DATA_WAIT:
        return ""
    return (
        f"Training waited for data for {percent(wait)} of the time: raise --data.num_workers, keep the images in "
        "memory (--data.cache memory), or make the files smaller."
    )


def _values(records: Records, kind: str, key: str) -> list[float]:
    return [value for record in records if record.get("kind") == kind and (value := finite(record, key)) is not None]


def _last(records: Records, kind: str, key: str) -> float | None:
    values = _values(records, kind, key)
    return values[-1] if values else None
