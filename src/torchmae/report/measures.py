"""The names of figures in evaluations.jsonl, in words and with their units, for tables on paper and on screen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

ACCURACY = "Accuracy, %"
AUROC = "AUROC"
TRAINING = "Training"
"""What a fine-tuning took: said beside its accuracy, not in a table of its own."""
OTHER = "Figure"

_POOLS = {"mean": "patch mean", "cls": "class token", "both": "both"}
_QUALITY = {"psnr": "PSNR, dB", "ssim": "SSIM", "explained_variance": "Explained variance"}
_TRAINED = {"finetune": "fine-tuned", "finetune_random": "trained from random weights"}
_TOOK = {"images": "labelled images", "seconds": "seconds", "loss": "loss"}
_ANOMALY = {
    "reconstruction": "reconstruction error",
    "reconstruction_max": "reconstruction error, worst patch",
    "knn": "kNN distance of the mean feature",
    "patch_knn": "kNN distance of patches",
    "patch_knn_max": "kNN distance, oddest patch",
}


class Measure(NamedTuple):
    """What a figure is.

    Attributes:
        unit: what it is measured in, as the head of a table says it; figures of one unit can stand in one table.
        label: the line of that table.
        beside: what predicted in the model's place ("Interpolation"); empty for the subject itself.
    """

    unit: str
    label: str
    beside: str = ""


class Figure(NamedTuple):
    """A figure as text.

    Attributes:
        value: the figure; empty where there is none.
        spread: how sure it is: an interval, or a deviation; may be empty.
        top5: of an accuracy, that of five guesses; may be empty.
    """

    value: str = ""
    spread: str = ""
    top5: str = ""


def measure_of(name: str) -> Measure:
    """What a figure's name in evaluations.jsonl stands for; one that is not known stands for itself."""
    accuracy = _accuracy_label(name)
    if accuracy:
        return Measure(ACCURACY, accuracy)
    trained, _, took = name.rpartition("_")
    if trained in _TRAINED and took in _TOOK:
        return Measure(TRAINING, f"{_TRAINED[trained]}: {_TOOK[took]}")
    if (score := name.removeprefix("anomaly_")) in _ANOMALY and score != name:
        return Measure(AUROC, _ANOMALY[score])
    quality = re.fullmatch(rf"(\w+)_([\d.]+)_({'|'.join(_QUALITY)})(_interpolation)?", name)
    if quality:
        strategy, ratio, metric, beside = quality.groups()
        return Measure(
            _QUALITY[metric], f"{strategy}, {100 * float(ratio):g}% hidden", "Interpolation" if beside else ""
        )
    return Measure(OTHER, name)


def figures_as_text(figures: Mapping[str, float]) -> dict[str, Figure]:
    """Figures by name; NAME_low, NAME_high, NAME_std and NAME_top5 go with the figure that they belong to."""
    texts = {}
    for name, value in figures.items():
        stem = re.sub(r"_(low|high|std|top5)$", "", name)
        if stem != name and stem in figures:
            continue
        show = _FORMATS.get(measure_of(name).unit, _number)
        low, high, deviation, top5 = (figures.get(f"{name}_{end}") for end in ("low", "high", "std", "top5"))
        spread = "" if deviation is None else f"± {show(deviation)}"
        if low is not None and high is not None:
            spread = f"{show(low)} to {show(high)}"
        texts[name] = Figure(show(value), spread, "" if top5 is None else show(top5))
    return texts


def _accuracy_label(name: str) -> str:
    """A classifier in words; empty where the name is none's."""
    if name in _TRAINED:
        return _TRAINED[name]
    if name == "attentive":
        return "attentive probe"
    neighbours = re.fullmatch(r"knn(\d+)", name)
    if neighbours:
        return f"kNN, k = {neighbours[1]}"
    probe = re.fullmatch(r"linear_(?:(paper_)?(mean|cls|both)|c([\d.]+))", name)
    if not probe:
        return ""
    by_paper, pool, strength = probe.groups()
    if strength:
        return f"linear probe, {_POOLS['mean']}, C = {strength}"
    return f"linear probe{', as in the paper' if by_paper else ''}, {_POOLS[pool]}"


def _number(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


_FORMATS = {
    ACCURACY: "{:.1f}".format,
    AUROC: "{:.3f}".format,
    _QUALITY["psnr"]: "{:.2f}".format,
    _QUALITY["ssim"]: "{:.3f}".format,
    _QUALITY["explained_variance"]: "{:.3f}".format,
}
