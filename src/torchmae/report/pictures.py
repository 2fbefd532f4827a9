"""Pictures of reconstructions: triplets of masked, reconstructed and original images."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageFont
from PIL.PngImagePlugin import PngInfo

from torchmae.files import replace_file
from torchmae.report.panels import Look, as_numpy, draw_table, panel_scale, sample_panels

if TYPE_CHECKING:
    from torchmae.report.panels import Images

HEADERS = ("masked", "reconstructed", "original")
_LAYOUT_KEY = "torchmae"


@dataclass(frozen=True)
class GridLayout:
    """The layout of a saved grid, stored in the PNG so that a page can cut the grid for a narrow screen.

    `count` triplets stand in `columns`; other lengths are in pixels.

    Attributes:
        panel: width and height of one image of a triplet.
        gutter: gap between the images of a triplet, and between rows.
        column_step: from the left edge of one triplet to the next.
        top: height of the headers.
        scale: enlargement of the images.
        note: that of the `Reconstruction`, for a viewer to show.
    """

    count: int
    columns: int
    panel: tuple[int, int]
    gutter: int
    column_step: int
    top: int
    scale: int
    note: str

    @property
    def column_width(self) -> int:
        """Width of a triplet in pixels."""
        return 3 * self.panel[0] + 2 * self.gutter

    def corner(self, triplet: int, place: int) -> tuple[int, int]:
        """The upper left corner of a panel; `place` 0, 1, 2: masked, reconstructed, original."""
        row, column = divmod(triplet, self.columns)
        left = column * self.column_step + place * (self.panel[0] + self.gutter)
        return left, self.top + row * (self.panel[1] + self.gutter)


def reconstruction_grid(
    masked: Images,
    reconstructed: Images,
    original: Images,
    path: Path | None = None,
    *,
    triplets_per_row: int | None = None,
    min_side: int = 144,
    note: str = "",
) -> Image.Image:
    """Draws rows of triplets: masked, reconstructed and original images, RGBA on a transparent background.

    One channel is drawn grey, two as the grey of their mean, three as RGB, more as the RGB of the first three. Small
    images are enlarged by an integer factor, without smoothing. A volume (3 spatial dimensions) is drawn as its three
    middle planes, a signal (1 dimension) as a line for each channel, in the range of its original.

    Args:
        masked: (N, C, *size) with 1 to 3 spatial dimensions, NaN where masked, infinite where there is no data. Images
            and volumes are clipped to [0, 1]; signals have any scale.
        reconstructed: likewise, with nothing masked.
        original: likewise, with nothing masked.
        path: where to save the picture as PNG; None: nowhere.
        triplets_per_row: None: one, or two for more than four images.
        min_side: minimum of the longer side of a panel, in pixels.
        note: that of the `Reconstruction`, for a viewer to show.

    Raises:
        CheckpointError: the picture cannot be saved.
    """
    triplet = [as_numpy(images) for images in (masked, reconstructed, original)]
    shape = triplet[0].shape
    assert all(images.shape == shape for images in triplet) and 3 <= len(shape) <= 5 and shape[0] > 0
    triplet = triplet if len(shape) < 5 else [Look("volume").flat(images) for images in triplet]
    scale = panel_scale(triplet[0].shape[2:], min_side)
    panels = [sample_panels(sample, min_side) for sample in zip(*triplet, strict=True)]
    columns = min(triplets_per_row or (2 if shape[0] > 4 else 1), shape[0])
    width, height = panels[0][0].size
    longest = max(HEADERS, key=len)
    # The longest header fills nine tenths of a panel, at 10 to 32 pixels.
    fitting = int(90 * width / ImageFont.load_default(100).getlength(longest))
    font = ImageFont.load_default(min(max(fitting, 10), 32))
    _, _, header_width, header_height = (math.ceil(edge) for edge in font.getbbox(longest))
    width = max(width, header_width)
    gutter = max(4, width // 24)
    layout = GridLayout(
        count=len(panels),
        columns=columns,
        panel=(width, height),
        gutter=gutter,
        column_step=3 * width + 5 * gutter,
        top=header_height + gutter,
        scale=scale,
        note=note,
    )
    rows = [[panel for one in panels[i : i + columns] for panel in one] for i in range(0, len(panels), columns)]
    gaps = range(3, 3 * columns, 3)
    grid = draw_table(rows, HEADERS * columns, font=font, size=layout.panel, column_gaps=gaps)
    grid.info[_LAYOUT_KEY] = json.dumps(asdict(layout))
    if path is not None:
        save_png(grid, path)
    return grid


def split_columns(grid: Image.Image) -> list[Image.Image]:
    """Cuts a grid into its columns of triplets, without headers; any other picture stays whole."""
    layout = read_layout(grid)
    if layout is None:
        return [grid]
    lefts = [i * layout.column_step for i in range(layout.columns)]
    return [grid.crop((left, layout.top, left + layout.column_width, grid.height)) for left in lefts]


def strip_grid(grids: Sequence[Image.Image], num_rows: int = 4) -> Image.Image | None:
    """Combines grids of several steps or models: masked, the reconstruction of each grid, original; without headers.

    Shows `num_rows` images at most; None if the images or masks of the grids differ.
    """
    layouts = [read_layout(grid) for grid in grids]
    layout = layouts[0]
    if layout is None or any(other is None or replace(other, note=layout.note) != layout for other in layouts):
        return None
    count = min(num_rows, layout.count)
    sources = [(grids[0], 0), *((grid, 1) for grid in grids), (grids[-1], 2)]
    for row in range(count):
        for place in (0, 2):  # masked and original
            if len({_panel(grid, layout, row, place).tobytes() for grid in grids}) > 1:
                return None
    return draw_table([[_panel(grid, layout, row, place) for grid, place in sources] for row in range(count)])


def _panel(grid: Image.Image, layout: GridLayout, triplet: int, place: int) -> Image.Image:
    left, top = layout.corner(triplet, place)
    return grid.crop((left, top, left + layout.panel[0], top + layout.panel[1]))


def read_layout(picture: Image.Image) -> GridLayout | None:
    """The layout that `reconstruction_grid` stored in a picture or its PNG; None for any other picture."""
    try:
        values = json.loads(picture.info[_LAYOUT_KEY])
        return GridLayout(**{**values, "panel": tuple(values["panel"])})
    except (KeyError, ValueError, TypeError):
        return None


def save_png(image: Image.Image, path: Path) -> None:
    """Saves a picture with the text in its `info`, whole or not at all; makes its folder.

    Raises:
        CheckpointError: the folder cannot be made or written to.
    """
    notes = PngInfo()
    for key, value in image.info.items():
        if isinstance(value, str):
            notes.add_text(str(key), value)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=notes)
    replace_file(path, buffer.getvalue())
