"""Is my loss good, and what looks wrong? A verdict and hints from the figures of a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torchmae.report.metrics import BASELINES, METRICS, finite, number, percent

Level = Literal["good", "fair", "poor", "unknown"]
Records = Sequence[Mapping[str, Any]]

# Standard errors: a smaller difference of two kNN accuracies counts as chance.
_STANDARD_ERRORS = 2.0
# Smallest change of explained variance over the last fifth of a run that is reported.
_TREND = 0.01
# At this kNN accuracy of raw pixels, in percent, features can hardly do better.
_EASY = 95.0
# Share of time spent waiting for data above which faster reading pays.
_DATA_WAIT = 0.2
# Multiple of the usual gradient norm above which a step cannot be trusted.
_EXPLODING = 10.0
_FEWEST_RECORDS = 10
# Features have collapsed if their effective rank is below this, or below this share of its maximum. On CIFAR-10 the
# rank of a ViT of width 192 begins at 34 and ends at 50 to 60.
_COLLAPSED_RANK = 3.0
_COLLAPSED_SHARE = 0.25
# A step that changes the weights by about a thousandth is usual. The shipped recipes have medians of 0.2% to 0.6%.
_LARGE_UPDATE = 2e-2
_SMALL_UPDATE = 5e-5


class Verdict(NamedTuple):
    """A verdict on a run: its level, a short answer, and sentences with the numbers and advice."""

    level: Level
    answer: str
    sentences: tuple[str, ...]


def judge(figures: Mapping[str, float], unit: str = "patches") -> Verdict:
    """Is the loss good? Compares reconstruction and features with their baselines.

    Good: both are better, or reconstruction is and there are no labels to test the features. Poor: neither is.
    `figures` are those of `final_figures`; `unit` is what a mask removes, "patches" or "values".
    """
    reconstruction = _judge_reconstruction(figures, unit)
    features = _judge_features(figures)
    sentences = (*reconstruction.sentences, *features.sentences)
    if "unknown" in (reconstruction.level, features.level) or reconstruction.level == features.level:
        return Verdict(reconstruction.level, reconstruction.answer, sentences)
    if "good" in (reconstruction.level, features.level):
        return Verdict("fair", f"{reconstruction.answer}, but {features.answer}", sentences)
    return Verdict(reconstruction.level, f"{reconstruction.answer}, and {features.answer}", sentences)


def _judge_reconstruction(figures: Mapping[str, float], unit: str) -> Verdict:
    loss, mean, interpolation = (figures.get(name) for name in ("loss", "loss_mean_patch", "loss_interpolation"))
    if loss is None or mean is None or interpolation is None:
        unmeasured = "Nothing was measured on held-out images, and a training loss alone does not tell."
        return Verdict("unknown", "Cannot say", (unmeasured,))
    variance = figures.get("explained_variance")
    # The mean of each image's own patches can be worse than one constant for all, which explains no variance.
    if loss >= mean or (variance is not None and variance <= 0):
        trivial = f"the mean of the visible {unit} ({number(mean)})" if loss >= mean else "one constant for everything"
        reason = (
            f"The loss of {number(loss)} is no better than that of predicting {trivial}. "
            "The model has not learned to use what is visible: train longer, or try another learning rate."
        )
        return Verdict("poor", "Not yet", (reason,))
    start = f"The loss of {number(loss)} is {percent(1 - loss / mean)} below predicting the mean ({number(mean)})"
    share = "" if variance is None else f" It explains {percent(variance)} of the variance of the masked {unit}."
    if loss >= interpolation:
        reason = (
            f"{start}, but not below interpolation from the visible {unit} ({number(interpolation)}).{share} "
            "Training longer is the first thing to try."
        )
        return Verdict("fair", "Partly", (reason,))
    reason = (
        f"{start} and {percent(1 - loss / interpolation)} below interpolation from the visible {unit} "
        f"({number(interpolation)}).{share}"
    )
    return Verdict("good", "Yes", (reason,))


def _judge_features(figures: Mapping[str, float]) -> Verdict:
    knn, images = figures.get("knn"), figures.get("knn_images")
    known = {BASELINES[key]: figures[f"knn_{key}"] for key in METRICS["knn"].baselines if f"knn_{key}" in figures}
    if knn is None or not known:
        return Verdict("unknown", "", ())
    beside = " and ".join(f"{value:.1f}% with {name}" for name, value in known.items())
    start = f"kNN with its features classifies {knn:.1f}% of held-out images correctly, against {beside}"
    name, best = max(known.items(), key=lambda item: item[1])
    # Binomial standard errors of both accuracies.
    noise = _STANDARD_ERRORS * math.sqrt((knn * (100 - knn) + best * (100 - best)) / images) if images else 0.0
    if knn - best > noise:
        return Verdict("good", "its features are good", (f"{start}: the features are worth having.",))
    if best - knn > noise:
        advice = f"{start}: as features they are not worth having yet. Train longer, or on more images."
        if name == "raw pixels" and best >= _EASY:
            advice = f"{start}. Pixels alone tell these classes apart: a poor test of features."
        return Verdict("poor", f"its features are worse than {name}", (advice,))
    reason = f"{start}: no difference."
    if noise:
        reason = f"{start}. On {images:,} images, less than {noise:.1f} points is too close to call."
    return Verdict("fair", f"its features are only level with {name}", (reason,))


def trend(val: Records) -> str:
    """A sentence if explained variance still rises at the end, or fell from its best; else empty."""
    points = [(int(record["step"]), finite(record, "explained_variance")) for record in val]
    known = [(step, value) for step, value in points if value is not None]
    if len(known) < 3:
        return ""
    last_step, last = known[-1]
    best_step, best = max(known, key=lambda point: point[1])
    if best - last > _TREND:
        return (
            f"Explained variance was highest at step {best_step:,} ({percent(best)}) and fell to {percent(last)}: "
            "the model may be over-fitting, and more images or fewer epochs may do better."
        )
    earlier = next(value for step, value in reversed(known) if step <= 0.8 * last_step or step == known[0][0])
    if last - earlier > _TREND:
        gain = 100 * (last - earlier)
        return f"Explained variance still rose by {gain:.1f} points over the last part: training longer should help."
    return ""


def hints(records: Records) -> list[str]:
    """A sentence or two on everything that looks wrong in records of metrics.jsonl, by rising step."""
    return [*filter(None, [loss_hint(records)]), *training_hints(records)]


def training_hints(records: Records) -> list[str]:
    """`hints` without the loss, for a page with the verdict of `judge`."""
    checks = (collapse_hint, chance_hint, gradient_hint, update_hint, data_hint)
    return [text for check in checks if (text := check(records))]


def loss_hint(records: Records) -> str:
    """A hint if the last loss on held-out images is no better than interpolation's; else empty, as for all hints."""
    loss, interpolation = _last(records, "val", "loss"), _last(records, "val", "loss_interpolation")
    if loss is None or interpolation is None or loss < interpolation:
        return ""
    return (
        f"The loss of {number(loss)} is no better than interpolating from what is visible ({number(interpolation)}): "
        "train longer, or try a higher learning rate."
    )


def collapse_hint(records: Records) -> str:
    """A hint if the effective rank of the features has collapsed."""
    ranks = [*_values(records, "baseline", "effective_rank_untrained"), *_values(records, "val", "effective_rank")]
    if not _values(records, "val", "effective_rank"):
        return ""
    last, highest = ranks[-1], max(ranks)
    if last >= _COLLAPSED_RANK and last >= _COLLAPSED_SHARE * highest:
        return ""
    fell = f", down from {highest:.1f}" if highest > 1.1 * last else ""
    return (
        f"The features are collapsing: they use {last:.1f} directions in effect{fell}, so that images look alike to "
        "them. Lower the learning rate, or mask more."
    )


def chance_hint(records: Records) -> str:
    """A hint if kNN is no better than always answering the commonest class."""
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
    """A hint if the gradient norm is far above its median at the end."""
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
    """A hint if steps are far too large or too small for the weights."""
    updates = _values(records, "train", "update_to_weight")
    if len(updates) < _FEWEST_RECORDS:
        return ""
    usual = statistics.median(updates)  # not the mean: a schedule begins and ends at zero
    if _SMALL_UPDATE <= usual <= _LARGE_UPDATE:
        return ""
    advice = "a higher" if usual < _SMALL_UPDATE else "a lower"
    return (
        f"A step changes the weights by {usual:.1e} of their norm (median), where about 1e-3 is usual: try {advice} "
        "learning rate."
    )


def data_hint(records: Records) -> str:
    """A hint if training waits for data for more than a fifth of the time."""
    waits = _values(records, "train", "data_wait")[1:]  # the first includes the start of the workers
    if not waits or (wait := sum(waits) / len(waits)) <= _DATA_WAIT:
        return ""
    return (
        f"Training waited for data for {percent(wait)} of the time: raise --data.num_workers, keep images of one size "
        "in memory (--data.cache memory), or make the files smaller."
    )


def _values(records: Records, kind: str, key: str) -> list[float]:
    return [value for record in records if record.get("kind") == kind and (value := finite(record, key)) is not None]


def _last(records: Records, kind: str, key: str) -> float | None:
    values = _values(records, kind, key)
    return values[-1] if values else None
