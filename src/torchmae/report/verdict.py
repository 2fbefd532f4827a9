"""Is my loss good? The figures of a run beside the trivial ones, and what they say in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["good", "fair", "poor", "unknown"]

# Two standard errors: a difference of two kNN accuracies below this is put down to chance.
_STANDARD_ERRORS = 2.0
# Change of explained variance over the last fifth of a run that is worth a remark.
_TREND = 0.01


@dataclass(frozen=True)
class Figures:
    """The final figures of a run; None where a figure was not measured.

    Attributes:
        step: when the loss was last measured.
        loss: on hidden patches of held-out images, under one fixed mask.
        loss_mean_patch: of predicting the mean of each image's visible patches.
        loss_interpolation: of interpolating from the visible patches.
        explained_variance: 1 - loss / variance of the hidden targets, at most 1, negative when worse than their mean.
        explained_variance_interpolation: the same for interpolation.
        knn: percent of held-out images that kNN on the features classifies correctly.
        knn_untrained: the same for the network before training.
        knn_pixels: the same for raw pixels.
        knn_images: held-out images classified, by kNN and by the linear probe.
        linear: percent of them that a linear classifier on the features gets right.
        linear_untrained: the same for the network before training.
        linear_pixels: the same for raw pixels.
    """

    step: int | None = None
    loss: float | None = None
    loss_mean_patch: float | None = None
    loss_interpolation: float | None = None
    explained_variance: float | None = None
    explained_variance_interpolation: float | None = None
    knn: float | None = None
    knn_untrained: float | None = None
    knn_pixels: float | None = None
    knn_images: int | None = None
    linear: float | None = None
    linear_untrained: float | None = None
    linear_pixels: float | None = None

    @property
    def explained_variance_mean_patch(self) -> float | None:
        """Explained variance of predicting the mean patch, from the losses' ratio."""
        if self.loss is None or self.loss_mean_patch is None or self.explained_variance is None or self.loss <= 0:
            return None
        return 1 - self.loss_mean_patch * (1 - self.explained_variance) / self.loss


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


def finite(record: Mapping[str, Any], key: str) -> float | None:
    """The number under `key`, or None if it is missing, null, NaN, infinite or no number."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def final_figures(
    summary: Mapping[str, Any],
    val: Sequence[Mapping[str, Any]],
    baseline: Sequence[Mapping[str, Any]] = (),
    knn_limit: int | None = None,
) -> Figures:
    """The figures a run ended with: its summary's, else those of its last validation that has them.

    Args:
        summary: summary.json; may be empty.
        val: validation records by rising step; may be empty.
        baseline: records of what needs no training, likewise.
        knn_limit: the setting eval.knn_val, at most which many held-out images are classified.
    """

    def last(key: str) -> float | None:
        candidates = (finite(record, key) for record in (summary, *reversed(val), *reversed(baseline)))
        return next((value for value in candidates if value is not None), None)

    measured = [int(record["step"]) for record in val if finite(record, "loss") is not None]
    num_val = finite(summary, "num_val")
    limits = [int(limit) for limit in (num_val, knn_limit) if limit is not None]
    return Figures(
        step=measured[-1] if measured else None,
        loss=last("loss"),
        loss_mean_patch=last("loss_mean_patch"),
        loss_interpolation=last("loss_interpolation"),
        explained_variance=last("explained_variance"),
        explained_variance_interpolation=last("explained_variance_interpolation"),
        knn=last("knn"),
        knn_untrained=last("knn_untrained"),
        knn_pixels=last("knn_pixels"),
        knn_images=min(limits) if num_val else None,
        linear=last("linear"),
        linear_untrained=last("linear_untrained"),
        linear_pixels=last("linear_pixels"),
    )


def judge(figures: Figures, unit: str = "patches") -> Verdict:
    """Is the loss good? Weighs reconstruction against the trivial predictors and features against trivial features.

    Good means that both pass, or that reconstruction does and there are no labels to test features with; poor, that
    neither does.

    Args:
        figures: the final figures.
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


def _judge_reconstruction(figures: Figures, unit: str) -> Verdict:
    loss, mean, interpolation = figures.loss, figures.loss_mean_patch, figures.loss_interpolation
    if loss is None or mean is None or interpolation is None:
        unmeasured = "Nothing was measured on held-out images, and a training loss alone does not tell."
        return Verdict("unknown", "Cannot say", (unmeasured,))
    variance = figures.explained_variance
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


# From this kNN accuracy of raw pixels on, in percent, there is no room above them.
_EASY = 95.0


def _judge_features(figures: Figures) -> Verdict:
    knn = figures.knn
    baselines = {"raw pixels": figures.knn_pixels, "the untrained network": figures.knn_untrained}
    known = {name: value for name, value in baselines.items() if value is not None}
    if knn is None or not known:
        return Verdict("unknown", "", ())
    beside = " and ".join(f"{value:.1f}% with {name}" for name, value in known.items())
    start = f"kNN with its features classifies {knn:.1f}% of held-out images correctly, against {beside}"
    name, best = max(known.items(), key=lambda item: item[1])
    noise = _STANDARD_ERRORS * math.hypot(
        _standard_error(knn, figures.knn_images), _standard_error(best, figures.knn_images)
    )
    if knn - best > noise:
        return Verdict("good", "its features are good", (f"{start}: the features are worth having.",))
    if best - knn > noise:
        advice = f"{start}: as features they are not worth having yet. Train longer, or on more images."
        if name == "raw pixels" and best >= _EASY:
            advice = f"{start}. Pixels alone tell these classes apart: a poor test of features."
        return Verdict("poor", f"its features are worse than {name}", (advice,))
    reason = f"{start}: no difference."
    if noise:
        reason = f"{start}. On {figures.knn_images:,} images, less than {noise:.1f} points is too close to call."
    return Verdict("fair", f"its features are only level with {name}", (reason,))


def _standard_error(accuracy: float, images: int | None) -> float:
    """Binomial standard error of an accuracy, both in percent; 0 where the number of images is unknown."""
    return math.sqrt(accuracy * (100 - accuracy) / images) if images else 0.0


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


def percent(share: float) -> str:
    """A share as percent: 0.618 -> "61.8%"."""
    return f"{100 * share:.1f}%"


def number(value: float) -> str:
    """A loss in four significant digits at most, without exponent where it can be: 0.4123."""
    return f"{value:.3f}" if 0.1 <= abs(value) < 1000 else f"{value:.3g}"
