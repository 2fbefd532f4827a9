"""Pictures of what a model learned: tables of panels, and a map of a data set, on a transparent background.

The PNG text fields Title and Description explain a picture; pages show them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from torchmae.report.panels import (
    TEXT,
    BoolArray,
    FloatArray,
    as_numpy,
    draw_table,
    heat,
    map_panel,
    sample_panels,
)
from torchmae.words import in_words

if TYPE_CHECKING:
    from torchmae.report.panels import Images

Labels: TypeAlias = npt.NDArray[np.int64]

_MIN_SIDE = 112
_SEGMENTED_SIDE = 256  # pixels of the longer side
_MAP_SIDE = 160
_PAIRS_PER_ROW = 4  # an image and its map
# Ten colours of a map, distinct on white and on near-black; ten more classes have another marker.
_HUES = ["#3b7dd8", "#e0702c", "#2e9b57", "#d9485f", "#8a63d2", "#a9752b", "#d265b3", "#7a8a99", "#9aa41c", "#1fa3b5"]
_MARKERS = ("o", "^")
_LONGEST_NAME = 15


def pca_picture(images: Images, colours: FloatArray, kind: str = "image") -> Image.Image:
    """Images, (N, C, H, W) in [0, 1], beside the colours of their patches, (N, rows, columns, 3) in [0, 1].

    Here and below, `images` may be signals (N, C, L) too, beside (N, columns, 3); `kind` names them.
    """
    pairs = [_beside(image, [colour]) for image, colour in zip(as_numpy(images), colours, strict=True)]
    headers = ("image", "features") * len(pairs[:_PAIRS_PER_ROW])
    return draw_table(
        _in_rows(pairs, _PAIRS_PER_ROW),
        headers,
        Title="Patch features as colours",
        Description="Beside each image, one colour for each patch: the first three principal components of the "
        "features of all patches shown, as red, green and blue; what depends on a patch's place alone is left out. "
        "Patches of the same colour look alike to the model.",
        column_gaps=range(2, len(headers), 2),
        kind=kind,
    )


def attention_picture(images: Images, attention: FloatArray, kind: str = "image") -> Image.Image:
    """Images, (N, C, H, W) in [0, 1], beside the class token's attention: the mean of the heads, then each head.

    `attention` is (N, heads, rows, columns), 0 or more; each map is drawn from 0 to its own largest value.
    """
    count = attention.shape[1]
    rows = []
    for image, heads in zip(as_numpy(images), attention, strict=True):
        maps = [heads.mean(0), *heads] if count > 1 else list(heads)
        rows.append(_beside(image, [heat(by_largest(values)) for values in maps]))
    return draw_table(
        rows,
        ("image", *(["mean"] if count > 1 else []), *(f"head {i + 1}" for i in range(count))),
        Title="Attention of the class token",
        Description="Beside each image, how much the class token attends to each patch in the last block, for the "
        "mean of its heads and for each head: bright is much, dark little, each map on its own scale.",
        column_gaps=(1,),
        kind=kind,
    )


def neighbours_picture(
    queries: Images,
    neighbours: Images,
    captions: Sequence[Sequence[str]],
    query_captions: Sequence[str],
    kind: str = "image",
) -> Image.Image:
    """Images, (N, C, H, W) in [0, 1], beside their neighbours in feature space, (N, K, C, H, W), nearest first.

    `captions` are N times K lines below the neighbours, `query_captions` N lines below the images.
    """
    pairs = zip(as_numpy(queries), as_numpy(neighbours), strict=True)
    rows = [[_panel(image) for image in (query, *found)] for query, found in pairs]
    count = len(rows[0]) - 1
    return draw_table(
        rows,
        ("image", "nearest", *[""] * (count - 1)),
        Title="Nearest neighbours",
        Description=f"Beside each image, the {count} images of the data set whose features are most like its own, the "
        "nearest first, with their cosine similarity.",
        captions=[[one, *others] for one, others in zip(query_captions, captions, strict=True)],
        column_gaps=(1,),
        kind=kind,
    )


def ratios_picture(
    originals: Images,
    masked: Sequence[Images],
    reconstructed: Sequence[Images],
    ratios: Sequence[float],
    note: str,
    kind: str = "image",
) -> Image.Image:
    """Images, and at each mask ratio, in (0, 1), the masked images (NaN where masked) and the reconstructions.

    All are (N, C, H, W) in [0, 1]. `note` is that of the `Reconstruction`.
    """
    versions = [as_numpy(images) for images in (*masked, *reconstructed, originals)]
    rows: list[list[Image.Image | None]] = []
    for sample in zip(*versions, strict=True):
        *panels, original = sample_panels(sample, _MIN_SIDE)
        rows += [[original, *panels[: len(ratios)]], [None, *panels[len(ratios) :]]]
    return draw_table(
        rows,
        ("original", *(f"{100 * ratio:.4g}% masked" for ratio in ratios)),
        Title="Reconstruction at rising mask ratios",
        Description="For each image, the masked image (blue-grey: masked) at rising mask ratios, and below it the "
        f"reconstruction: visible patches as they were, {note}.",
        column_gaps=(1,),
        kind=kind,
        row_gaps=range(2, len(rows), 2),
    )


def anomaly_picture(
    images: Sequence[FloatArray],
    masks: Sequence[BoolArray | None],
    maps: Mapping[str, Sequence[FloatArray]],
    truth: Sequence[str],
    kind: str = "image",
) -> Image.Image:
    """Images, (C, H, W) in [0, 1] of any size, beside their masks and anomaly maps by name, (H, W) in [0, 1], on them.

    `truth` are the captions. A column of masks is there where any image has one. Maps of signals, (L,), stand alone.
    """
    groups = []
    has_masks, overlaid = any(mask is not None for mask in masks), images[0].ndim == 3
    for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
        colours = [heat(values[number], "inferno") for values in maps.values()]
        if not overlaid:
            groups.append(_beside(image, colours))
            continue
        plain = sample_panels([image], 1)[0]
        tints = [None if mask is None else np.where(mask[..., None], 255, 0)] if has_masks else []
        tints += [255 * np.nan_to_num(colour, posinf=1) for colour in colours]
        group = [plain, *(plain if tint is None else _mixed(plain, tint) for tint in tints)]
        groups.append([_resized(panel, _MAP_SIDE) for panel in group])
    headers = ("image", *(["mask"] if has_masks else []), *maps)
    return draw_table(
        _in_rows(groups, 2),
        headers * len(groups[:2]),
        size=_largest(groups),
        Title="The most unusual images",
        Description=f"Beside each image, maps of what is unusual in it{', drawn over it' if overlaid else ''}: bright "
        "is unusual. A colour means the same in all maps of one kind."
        + (" The mask shows the defects as they were marked." if has_masks else ""),
        captions=_in_rows([[word] + [""] * (len(headers) - 1) for word in truth], 2),
        column_gaps=(len(headers),),
        kind=kind,
    )


def segmentation_picture(
    images: Sequence[FloatArray], truth: Sequence[Labels], guesses: Sequence[Labels], classes: Sequence[str]
) -> Image.Image:
    """Images, (C, H, W) in [0, 1] of any size, beside their masks and guesses: classes, (H, W), 255 where none counts.

    Colours lie on all classes but the first.
    """
    colours = np.array([Image.new("RGB", (1, 1), hue).getpixel((0, 0)) for hue in _HUES], dtype=np.float32)
    rows = []
    for image, *maps in zip(images, truth, guesses, strict=True):
        plain = sample_panels([image], 1)[0]  # transparent where there is no data, which guesses take for no class
        pixels = np.asarray(plain.convert("RGB"), dtype=np.float32)
        panels = [plain]
        for found in maps:
            tinted = np.where(found[..., None] == 255, 128, colours[(found.astype(np.int64) - 1) % len(colours)])
            panels.append(_mixed(plain, np.where(found[..., None] == 0, pixels, tinted)))
        rows.append([_resized(panel, _SEGMENTED_SIDE) for panel in panels])
    return draw_table(
        rows,
        ("image", "mask", "guess"),
        size=_largest(rows),
        Title="Segmentation of test pictures",
        Description="Beside each picture its mask and what the model makes of it, one colour for each class; "
        f"without colour: {classes[0]}; grey: does not count.",
    )


def map_picture(
    points: FloatArray, labels: Labels | None, classes: Sequence[str] | None, method: str, kind: str = "image"
) -> Image.Image:
    """A map of points (N, 2) with the 20 commonest classes in colour and the rest in grey.

    `labels` are (N,), -1 where unknown; `classes` are their names; `method` has made the points, such as "t-SNE".
    """
    known = np.full(len(points), -1) if labels is None else labels
    values, counts = np.unique(known[known >= 0], return_counts=True)
    shown = sorted(values[np.argsort(-counts, kind="stable")][: len(_HUES) * len(_MARKERS)].tolist())
    size = float(np.clip(12000 / len(points), 6, 40))
    look = {"font.size": 12, "text.color": [value / 255 for value in TEXT[:3]], "scatter.edgecolors": "none"}
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", look]):
        figure = Figure(figsize=(5.0, 5.4), dpi=136, layout="constrained")  # narrow: names are legible on a phone
        axes = figure.add_subplot()
        axes.set_axis_off()
        rest = ~np.isin(known, shown)
        if rest.any():
            axes.scatter(
                points[rest, 0], points[rest, 1], s=size, c="#8a929c", alpha=0.6, label="other" if shown else None
            )
        for order, label in enumerate(shown):
            marker, colour = divmod(order, len(_HUES))
            name = class_name(label, classes)
            if len(name) > _LONGEST_NAME:
                name = f"{name[: _LONGEST_NAME - 1].rstrip()}…"
            x, y = points[known == label].T
            axes.scatter(x, y, s=size, c=_HUES[colour], marker=_MARKERS[marker], alpha=0.8, label=name)
        if shown:
            figure.legend(
                loc="outside lower center",
                ncols=3,
                frameon=False,
                handletextpad=0.2,
                columnspacing=1,
                markerscale=math.sqrt(40 / size),
            )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", transparent=True)
    with Image.open(buffer) as opened:
        picture = opened.convert("RGBA")
    description = (
        f"{len(points):,} images placed on a plane by {method} of their features: images that lie close together look "
        "alike to the model, which was never told a label."
    )
    if shown:
        extent = "" if len(shown) == len(values) else f", for the {len(shown)} commonest"
        description += f" A point's colour is its class{extent}."
    picture.info = {"Title": "Map of the features", "Description": in_words(description, kind)}
    return picture


def class_name(label: int, classes: Sequence[str] | None) -> str:
    """The name of a label; "class" and its number if there is none, or the font may lack its letters."""
    name = classes[label] if classes is not None and label < len(classes) else ""
    drawable = name and not name.startswith("_") and all(ord(letter) < 0x250 for letter in name)
    return name if drawable else f"class {label}"


def by_largest(values: FloatArray) -> FloatArray:
    """Values, 0 or more, divided by the largest that is finite."""
    scaled: FloatArray = values / max(float(values.max(initial=0, where=np.isfinite(values))), 1e-12)
    return scaled


def _panel(image: FloatArray) -> Image.Image:
    return sample_panels([image], _MIN_SIDE)[0]


def _beside(image: FloatArray, maps: Iterable[FloatArray]) -> list[Image.Image]:
    """An image, and maps of the same size."""
    panel = _panel(image)
    return [panel, *(map_panel(colours, panel.size) for colours in maps)]


def _mixed(panel: Image.Image, tint: npt.NDArray[Any]) -> Image.Image:
    """A panel under colours, (H, W, 1 or 3) from 0 to 255."""
    mixed = 0.45 * np.asarray(panel.convert("RGB"), dtype=np.float32) + 0.55 * tint
    return Image.fromarray(np.round(mixed).astype(np.uint8))


def _resized(panel: Image.Image, side: int) -> Image.Image:
    """A panel whose longer side has `side` pixels."""
    factor = side / max(panel.size)
    kind = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
    return panel.resize((max(1, round(panel.width * factor)), max(1, round(panel.height * factor))), kind)


def _largest(rows: Sequence[Sequence[Image.Image]]) -> tuple[int, int]:
    """Width and height of a cell for all panels."""
    width, height = (max(row[0].size[axis] for row in rows) for axis in (0, 1))
    return width, height


def _in_rows(groups: Sequence[list[Any]], count: int) -> list[list[Any]]:
    """Rows of `count` groups each."""
    return [[one for group in groups[i : i + count] for one in group] for i in range(0, len(groups), count)]
