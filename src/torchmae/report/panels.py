"""Panels (an image, a signal or a map each), and tables of panels, of which all larger pictures consist."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    import torch

    Images: TypeAlias = npt.NDArray[np.floating] | torch.Tensor

FloatArray: TypeAlias = npt.NDArray[np.float32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

# The colour of masked pixels: a bluish mid-grey, unlike black and the greys of an image.
MASKED = (116, 124, 138)
# Transparent; white in a viewer without transparency.
BACKGROUND = (255, 255, 255, 0)
# Readable on white and on near-black, because the background is transparent.
TEXT = (118, 122, 128, 255)
_SIGNAL_COLOUR = (11, 95, 174)
_SIGNAL_BACKGROUND = 246
# Width over height of the panel of a 1-D signal.
_SIGNAL_ASPECT = 3


def as_numpy(images: Images) -> FloatArray:
    """A float32 array of a tensor on any device, or of an array."""
    if isinstance(images, np.ndarray):
        return images.astype(np.float32)
    array: FloatArray = images.detach().float().cpu().numpy()
    return array


def panel_scale(size: Sequence[int], min_side: int) -> int:
    """The smallest integer factor that gives an image's longer side `min_side` pixels; 1 for signals."""
    return 1 if len(size) == 1 else -(-min_side // max(size[-2:]))


def sample_panels(versions: Sequence[FloatArray], min_side: int) -> list[Image.Image]:
    """Draws versions of one sample alike, at least `min_side` pixels on the longer side.

    Versions are images (C, H, W) or volumes (C, D, H, W) in [0, 1], or signals (C, L), all drawn in the range of the
    last version; NaN marks masked values, which the last version has not.
    """
    size = versions[0].shape[1:]
    if len(size) == 1:
        return _signal_panels(versions, min_side)
    return [_image_panel(image, panel_scale(size, min_side)) for image in versions]


def _image_panel(image: FloatArray, scale: int) -> Image.Image:
    """An image, or the middle slice of a volume: one or two channels grey, the first three of more as RGB."""
    flat = image[:, image.shape[1] // 2] if image.ndim == 4 else image
    known = np.nan_to_num(flat, nan=0.5)  # a value masked in one channel alone
    channels = known[:3] if len(known) >= 3 else known.mean(axis=0, keepdims=True).repeat(3, axis=0)
    pixels = np.round(channels.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    pixels[_is_masked(flat)] = MASKED
    return Image.fromarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1))


def map_panel(colours: FloatArray, size: tuple[int, int]) -> Image.Image:
    """Colours of patches, (*grid, 3) in [0, 1], enlarged without smoothing to `size`, width and height in pixels.

    Of a grid with three axes, the middle slice of the first; a grid with one axis is a strip.
    """
    flat = colours[colours.shape[0] // 2] if colours.ndim == 4 else colours.reshape(-1, *colours.shape[-2:])
    pixels = np.round(flat * 255).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def heat(values: FloatArray, palette: str = "viridis") -> FloatArray:
    """Values in [0, 1] as colours of a matplotlib palette, dark to bright: (...) to (..., 3) in [0, 1]."""
    from matplotlib import colormaps

    return np.asarray(colormaps[palette](values)[..., :3], dtype=np.float32)


def draw_table(
    rows: Sequence[Sequence[Image.Image | None]],
    headers: Sequence[str] = (),
    *,
    font: Font | None = None,
    size: tuple[int, int] | None = None,
    captions: Sequence[Sequence[str]] = (),
    column_gaps: Collection[int] = (),
    row_gaps: Collection[int] = (),
    **info: str,
) -> Image.Image:
    """A picture, RGBA on a transparent background, of rows of panels of one size under headers.

    Args:
        rows: of panels; None leaves a cell empty.
        headers: of the columns.
        font: None: fits the panels.
        size: width and height of a cell; None: those of a panel.
        captions: a line below each panel.
        column_gaps: columns with a wider gap before them.
        row_gaps: rows with a wider gap before them.
        **info: text fields of the picture, such as Title and Description.
    """
    width, height = size or next(panel for row in rows for panel in row if panel is not None).size
    gutter = max(4, width // 24)
    font = font or ImageFont.load_default(max(10, min(round(width / 7.5), 20)))
    line = math.ceil(font.getbbox("Ag")[3]) + 3
    below = line if any(map(any, captions)) else 0
    top = 0 if not headers else line if size is None else gutter + math.ceil(font.getbbox(max(headers, key=len))[3])
    lefts = _places(max(map(len, rows)), width, gutter, column_gaps)
    tops = [top + y for y in _places(len(rows), height + below, gutter, row_gaps)]
    picture = Image.new("RGBA", (lefts[-1] + width, tops[-1] + height + below), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    for x, header in zip(lefts, headers, strict=False):
        pen.text((x, 0), _fit(header, font, width), fill=TEXT, font=font)
    for number, (y, row) in enumerate(zip(tops, rows, strict=True)):
        for column, (x, panel) in enumerate(zip(lefts, row, strict=False)):
            if panel is not None:
                picture.paste(panel, (x, y))
            if below:
                pen.text((x, y + height + 1), _fit(captions[number][column], font, width), fill=TEXT, font=font)
    picture.info.update(info)
    return picture


def _places(count: int, size: int, gutter: int, gaps: Collection[int]) -> list[int]:
    """Starts of `count` cells of `size`, `gutter` apart, or three times that before the cells in `gaps`."""
    return [i * (size + gutter) + 2 * gutter * sum(gap <= i for gap in gaps) for i in range(count)]


def _fit(text: str, font: Font, width: int) -> str:
    """A text cut to `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."


def _is_masked(image: FloatArray) -> BoolArray:
    """(C, *size) to (*size): where all channels are masked."""
    masked: BoolArray = np.asarray(np.isnan(image).all(axis=0))
    return masked


def _signal_panels(signals: Sequence[FloatArray], min_side: int) -> list[Image.Image]:
    """Signals (C, L) as a line for each channel, in the range of the last signal; grey where they are NaN."""
    low, high = float(signals[-1].min()), float(signals[-1].max())
    margin = 0.06 * (high - low) or 0.5
    low, high = low - margin, high + margin
    width, height = _SIGNAL_ASPECT * min_side, min_side
    panels = []
    for signal in signals:
        masked = _is_masked(signal)
        pixels = np.full((height, width, 3), _SIGNAL_BACKGROUND, dtype=np.uint8)
        # One column of pixels shows the samples around it.
        pixels[:, masked[(np.arange(width) * len(masked)) // width]] = MASKED
        panels.append(Image.fromarray(pixels))
        pen = ImageDraw.Draw(panels[-1])
        x = (np.arange(len(masked)) + 0.5) * width / len(masked)
        for channel in signal:
            y = ((high - channel.clip(low, high)) / (high - low)) * (height - 1)
            for start, stop in _visible_spans(channel):
                points = [(float(x[i]), float(y[i])) for i in range(start, stop)]
                pen.line(points * 2 if len(points) == 1 else points, fill=_SIGNAL_COLOUR, width=2)
    return panels


def _visible_spans(channel: FloatArray) -> list[tuple[int, int]]:
    """[start, stop) of each run of samples without NaN."""
    known = np.concatenate([[False], ~np.isnan(channel), [False]])
    edges = np.flatnonzero(known[1:] != known[:-1])
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
