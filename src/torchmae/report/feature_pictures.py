"""Pictures of what a model learned: colours for patches, attention, neighbours, several mask ratios.

Each is a table of panels under headers, on a transparent ground. Its PNG says in its own text fields, Title and
Description, what it shows; a page takes its heading and its words for those who cannot see from there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from torchmae.report.panels import BACKGROUND, TEXT, FloatArray, as_numpy, heat, map_panel, sample_panels

if TYPE_CHECKING:
    from torchmae.report.panels import Images

_MIN_SIDE = 112
# Images beside each other, each with its map.
_PAIRS_PER_ROW = 4


@dataclass(frozen=True)
class Cell:
    """A place of the table.

    Attributes:
        panel: what stands there.
        caption: a line below it; cut where it is too long.
    """

    panel: Image.Image
    caption: str = ""


def pca_picture(images: Images, colours: FloatArray) -> Image.Image:
    """Images beside the colours of their patches.

    Args:
        images: (N, C, *size) in [0, 1].
        colours: (N, *grid, 3) in [0, 1], as `evaluation.feature_maps.patch_colours` gives them.
    """
    panels = [_panel(image) for image in as_numpy(images)]
    pairs = [(Cell(panel), Cell(map_panel(colour, panel.size))) for panel, colour in zip(panels, colours, strict=True)]
    rows = [
        [cell for pair in pairs[start : start + _PAIRS_PER_ROW] for cell in pair]
        for start in range(0, len(pairs), _PAIRS_PER_ROW)
    ]
    headers = ("image", "features") * len(pairs[:_PAIRS_PER_ROW])
    return _table(
        rows,
        headers,
        column_gaps=range(2, len(headers), 2),
        title="Patch features as colours",
        description="Beside each image, one colour for each patch: the first three principal components of the "
        "features of all patches shown, as red, green and blue; what depends on a patch's place alone is left out. "
        "Patches of the same colour look alike to the model.",
    )


def attention_picture(images: Images, attention: FloatArray) -> Image.Image:
    """Images beside the class token's attention: the mean of the heads, then each head.

    Args:
        images: (N, C, *size) in [0, 1].
        attention: (N, heads, *grid), 0 or more; each map is drawn from 0 to its own largest value.
    """
    rows: list[list[Cell]] = []
    for image, heads in zip(as_numpy(images), attention, strict=True):
        panel = _panel(image)
        maps = [heads.mean(0), *heads] if len(heads) > 1 else list(heads)
        scaled = [values / max(float(values.max()), 1e-12) for values in maps]
        rows.append([Cell(panel), *(Cell(map_panel(heat(values), panel.size)) for values in scaled)])
    count = attention.shape[1]
    return _table(
        rows,
        ("image", *(["mean"] if count > 1 else []), *(f"head {i + 1}" for i in range(count))),
        column_gaps=(1,),
        title="Attention of the class token",
        description="Beside each image, how much the class token attends to each patch in the last block, for the "
        "mean of its heads and for each head: bright is much, dark little, each map on its own scale.",
    )


def neighbours_picture(
    queries: Images, neighbours: Images, captions: Sequence[Sequence[str]], query_captions: Sequence[str]
) -> Image.Image:
    """Images beside those whose features are nearest.

    Args:
        queries: (N, C, *size) in [0, 1].
        neighbours: (N, K, C, *size) in [0, 1], nearest first.
        captions: N lists of K lines, one below each neighbour.
        query_captions: N lines.
    """
    rows = [
        [
            Cell(_panel(query), query_caption),
            *(Cell(_panel(image), line) for image, line in zip(row, lines, strict=True)),
        ]
        for query, query_caption, row, lines in zip(
            as_numpy(queries), query_captions, as_numpy(neighbours), captions, strict=True
        )
    ]
    count = len(rows[0]) - 1
    return _table(
        rows,
        ("image", "nearest", *[""] * (count - 1)),
        column_gaps=(1,),
        title="Nearest neighbours",
        description=f"Beside each image, the {count} images of the data set whose features are most like its own, the "
        "nearest first, with their cosine similarity.",
    )


def ratios_picture(
    originals: Images, masked: Sequence[Images], reconstructed: Sequence[Images], ratios: Sequence[float], note: str
) -> Image.Image:
    """Images, what the model sees of them at several mask ratios, and what it makes of that.

    Args:
        originals: (N, C, *size) in [0, 1].
        masked: one (N, C, *size) for each ratio, NaN where hidden.
        reconstructed: likewise, without NaN.
        ratios: share that is hidden, in (0, 1).
        note: how the reconstruction came about (`Reconstruction.note`).
    """
    seen, filled = [as_numpy(images) for images in masked], [as_numpy(images) for images in reconstructed]
    rows: list[list[Cell | None]] = []
    for number, original in enumerate(as_numpy(originals)):
        versions = [images[number] for images in (*seen, *filled)]
        *panels, last = sample_panels([*versions, original], _MIN_SIDE)
        rows.append([Cell(last), *map(Cell, panels[: len(seen)])])
        rows.append([None, *map(Cell, panels[len(seen) :])])
    return _table(
        rows,
        ("original", *(f"{100 * ratio:.4g}% hidden" for ratio in ratios)),
        column_gaps=(1,),
        row_gaps=range(2, len(rows), 2),
        title="Reconstruction as more is hidden",
        description="For each image, what the model sees when more and more is hidden (blue-grey), and below that what "
        f"it makes of it: what is visible as it was, {note}.",
    )


def _panel(image: FloatArray) -> Image.Image:
    return sample_panels([image], _MIN_SIDE)[0]


def _table(
    rows: Sequence[Sequence[Cell | None]],
    headers: Sequence[str],
    *,
    title: str,
    description: str,
    column_gaps: Collection[int] = (),
    row_gaps: Collection[int] = (),
) -> Image.Image:
    """Places cells of one size under headers.

    Args:
        rows: of cells; None leaves a place empty.
        headers: one for each column.
        title: for the PNG's text field.
        description: likewise.
        column_gaps: columns before which there is more room.
        row_gaps: rows, likewise.

    Returns:
        RGBA with a transparent background.
    """
    width, height = next(cell for row in rows for cell in row if cell is not None).panel.size
    gutter = max(4, width // 24)
    font = ImageFont.load_default(max(10, min(round(width / 7.5), 20)))
    line = math.ceil(font.getbbox("Ag")[3]) + 3
    below = line if any(cell is not None and cell.caption for row in rows for cell in row) else 0
    left = _places(max(map(len, rows)), width, gutter, column_gaps)
    top = [line + y for y in _places(len(rows), height + below, gutter, row_gaps)]
    picture = Image.new("RGBA", (left[-1] + width, top[-1] + height + below), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    for x, header in zip(left, headers, strict=True):
        pen.text((x, 0), _fit(header, font, width), fill=TEXT, font=font)
    for y, row in zip(top, rows, strict=True):
        for x, cell in zip(left, row, strict=False):
            if cell is not None:
                picture.paste(cell.panel, (x, y))
                pen.text((x, y + height + 1), _fit(cell.caption, font, width), fill=TEXT, font=font)
    picture.info.update(Title=title, Description=description)
    return picture


def _places(count: int, size: int, gutter: int, gaps: Collection[int]) -> list[int]:
    """Where each of `count` things of `size` begins, `gutter` apart, three times that before those in `gaps`."""
    return [i * (size + gutter) + 2 * gutter * sum(gap <= i for gap in gaps) for i in range(count)]


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """As much of a text as `width` pixels hold."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."
