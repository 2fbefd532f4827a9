"""A map of a data set: each image a point, coloured by its class."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from torchmae.report.panels import TEXT, FloatArray

Labels = npt.NDArray[np.int64]

# Ten colours of middle lightness, told apart on white and on near-black; a second ten wear another marker.
_COLOURS = (
    "#3b7dd8",
    "#e0702c",
    "#2e9b57",
    "#d9485f",
    "#8a63d2",
    "#a9752b",
    "#d265b3",
    "#7a8a99",
    "#9aa41c",
    "#1fa3b5",
)
_MARKERS = ("o", "^")
_MAX_CLASSES = len(_COLOURS) * len(_MARKERS)
# Inches: narrow, so that names are still legible on a phone.
_SIZE = (5.0, 5.4)
_DPI = 136
_LEGEND_COLUMNS = 3
_LONGEST_NAME = 15
_STYLE = {"font.size": 12, "text.color": [value / 255 for value in TEXT[:3]]}


def map_picture(points: FloatArray, labels: Labels | None, classes: Sequence[str] | None, method: str) -> Image.Image:
    """Draws a map of embeddings.

    Args:
        points: (N, 2).
        labels: (N,), -1 where unknown; None: nothing has a label.
        classes: the name of each label; None: its number.
        method: how the points came about, as the description names it, such as "t-SNE".

    Returns:
        RGBA with a transparent background. At most 20 classes, the commonest, are in colour; the rest are grey.
    """
    known = np.full(len(points), -1) if labels is None else labels
    values, counts = np.unique(known[known >= 0], return_counts=True)
    shown = sorted(values[np.argsort(-counts, kind="stable")][:_MAX_CLASSES].tolist())
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
        axes = figure.add_subplot()
        axes.set_axis_off()
        _scatter(axes, points, known, shown, classes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", transparent=True)
    with Image.open(buffer) as opened:
        picture = opened.convert("RGBA")
    picture.info.clear()
    picture.info.update(Title="Map of the features", Description=_describe(len(points), method, shown, len(values)))
    return picture


def _scatter(axes: Axes, points: FloatArray, labels: Labels, shown: list[int], classes: Sequence[str] | None) -> None:
    size = float(np.clip(12000 / len(points), 6, 40))
    rest = ~np.isin(labels, shown)
    if rest.any():
        name = None if not shown else "other"
        axes.scatter(points[rest, 0], points[rest, 1], s=size, c="#8a929c", alpha=0.6, linewidths=0, label=name)
    for order, label in enumerate(shown):
        axes.scatter(
            points[labels == label, 0],
            points[labels == label, 1],
            s=size,
            c=_COLOURS[order % len(_COLOURS)],
            marker=_MARKERS[order // len(_COLOURS)],
            alpha=0.8,
            linewidths=0,
            label=_cut(class_name(label, classes)),
        )
    if shown:
        legend = axes.figure.legend(
            loc="outside lower center", ncols=_LEGEND_COLUMNS, frameon=False, handletextpad=0.2, columnspacing=1
        )
        for handle in legend.legend_handles:
            handle.set_sizes([40])  # type: ignore[union-attr]
            handle.set_alpha(1)  # type: ignore[union-attr]


def class_name(label: int, classes: Sequence[str] | None) -> str:
    """What to write for a label: its name, or its number where the picture's font may not have the letters."""
    name = classes[label] if classes is not None and label < len(classes) else ""
    drawable = name and not name.startswith("_") and all(ord(letter) < 0x250 for letter in name)
    return name if drawable else f"class {label}"


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1].rstrip()}…"


def _describe(count: int, method: str, shown: list[int], num_classes: int) -> str:
    start = f"{count:,} images placed on a plane by {method} of their features: images that lie close together look "
    start += "alike to the model, which was never told a label."
    if not shown:
        return start
    extent = "its class" if len(shown) == num_classes else f"its class, for the {len(shown)} commonest"
    return f"{start} A point's colour is {extent}."
