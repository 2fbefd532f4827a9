"""Is my loss good? The figures of a run beside the trivial ones, and what they say in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torchmae.report.metrics import BASELINES, METRICS, finite, number, percent

Level = Literal["good", "fair", "poor", "unknown"]

# Two standard errors: a difference of two kNN accuracies below this is put down to chance.
_STANDARD_ERRORS = 2.0
# Change of explained variance over the last fifth of a run that is worth a remark.
_TREND = 0.01
# From this kNN accuracy of raw pixels on, in percent, there is no room above them.
_EASY = 95.0


@dataclass(frozen=True)
class Verdict:
    """An answer to a question about a run.

    Attributes:
        level: how good, for colour.
        answer: a few words.
        sentences: why, with the numbers, and what to do about it.
    """

    level: Level
    answer: str
    sentences: tuple[str, ...]


def judge(figures: Mapping[str, float], unit: str = "patches") -> Verdict:
    """Is the loss good? Weighs reconstruction against the trivial predictors and features against trivial features.

    Good means that both pass, or that reconstruction does and there are no labels to test features with; poor, that
    neither does.

    Args:
        figures: as `final_figures` gives them.
        unit: what is hidden, for the sentences: "patches", or "values" where masking is element-wise.
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
    # The mean of each image's own patches can do worse than one constant for all, which explains nothing at all.
    if loss >= mean or (variance is not None and variance <= 0):
        trivial = f"the mean of the visible {unit} ({number(mean)})" if loss >= mean else "one constant for everything"
        reason = (
            f"The loss of {number(loss)} is no better than that of predicting {trivial}. "
            "The model has not learned to use what is visible: train longer, or try another learning rate."
        )
        return Verdict("poor", "Not yet", (reason,))
    start = f"The loss of {number(loss)} is {percent(1 - loss / mean)} below predicting the mean ({number(mean)})"
    share = "" if variance is None else f" It explains {percent(variance)} of the variance of the hidden {unit}."
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


def trend(val: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on whether explained variance still rose, or fell from its best; empty if neither."""
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
