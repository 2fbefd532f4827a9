"""Panels (an image, a signal or a map each), and tables of panels, of which all larger pictures consist.

In all of them NaN marks a masked value, and infinity a place without data, which stays transparent.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from torchmae.errors import ConfigError, nearest
from torchmae.words import in_words

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
_LEAST_ROW = 16  # pixels of a channel's height
_FRAMES = 6  # of a clip in a strip
# Names of bands that make a colour picture: of photographs, Sentinel-2 in two spellings.
_COLOURS = (("red", "green", "blue"), ("r", "g", "b"), ("b4", "b3", "b2"), ("b04", "b03", "b02"))


@dataclass(frozen=True)
class Look:
    """How samples of a kind (`words.kind_of`) are drawn.

    `channels` are those drawn of images, volumes and clips: one as grey or three as red, green and blue; empty: one or
    two channels as the grey of their mean, the first three of others. Of signals, those in rows; empty: all.
    """

    kind: str = "image"
    channels: tuple[int, ...] = ()

    @classmethod
    def of(cls, kind: str, num_channels: int, bands: Sequence[str] = (), show: Sequence[int | str] = ()) -> Look:
        """The look of samples with these channels, of which `show` names some by name or by number from 1.

        Without `show`, the bands called red, green and blue, if there are any. ConfigError: no such channel, or neither
        one nor three.
        """
        lower = [band.lower() for band in bands]
        if not show:
            named = next((names for names in _COLOURS if {*names} <= {*lower}), ())
            return cls(kind, tuple(map(lower.index, named)))
        known = {**{str(i + 1): i for i in range(num_channels)}, **{band: i for i, band in enumerate(lower)}}
        for name in show:
            if str(name).lower() not in known:
                near = nearest(str(name), bands)
                fix = f"choose from {', '.join([*bands, f'1 to {num_channels}'])}"
                raise ConfigError(
                    f"there is no channel {name!r} to show", f"did you mean {near!r}? {fix}" if near else fix
                )
        if kind != "signal" and len(show) not in (1, 3):
            raise ConfigError(f"show names {len(show)} channels", "name one (grey) or three (red, green, blue)")
        return cls(kind, tuple(known[str(name).lower()] for name in show))

    def flat(self, images: Images) -> FloatArray:
        """(N, C, *size) as (N, C', H, W), in pixels of the image: the three planes of a volume, frames of a clip.

        Signals keep their one axis. Without `channels`, all channels stay.
        """
        values = as_numpy(images)
        if self.channels and values.shape[1] > 1:
            values = values[:, list(self.channels)]
        if values.ndim != 5:
            return values
        if self.kind == "clip":
            count = min(_FRAMES, values.shape[2])
            chosen = (np.arange(count) + 0.5) * values.shape[2] / count
            parts = [values[:, :, int(frame)] for frame in chosen]
        else:
            parts = [values.take(values.shape[axis] // 2, axis) for axis in (2, 3, 4)]
        height, gap = max(part.shape[2] for part in parts), max(1, values.shape[-1] // 24)
        padded = [
            np.pad(part, ((0, 0), (0, 0), (0, height - part.shape[2]), (0, gap)), constant_values=np.inf)
            for part in parts
        ]
        return np.concatenate(padded, axis=-1)[..., :-gap]

    def spread(self, maps: npt.NDArray[Any], grid: Sequence[int], size: Sequence[int]) -> FloatArray:
        """Values of patches, (N, L, ...), at each pixel of `flat` images of a `size`, (N, *pixels, ...)."""
        numbers = np.arange(math.prod(grid), dtype=np.float32).reshape(1, 1, *grid)
        for axis, (length, cells) in enumerate(zip(size, grid, strict=True), 2):
            numbers = numbers.repeat(length // cells, axis)
        places = Look(self.kind).flat(numbers)[0, 0]
        known = np.isfinite(places)
        values = maps[:, np.where(known, places, 0).astype(np.int64)].astype(np.float32)
        values[:, ~known] = np.inf
        return values


def as_numpy(images: Images) -> FloatArray:
    """A float32 array of a tensor on any device, or of an array."""
    if isinstance(images, np.ndarray):
        return images.astype(np.float32)
    array: FloatArray = images.detach().float().cpu().numpy()
    return array


def panel_scale(size: Sequence[int], min_side: int) -> int:
    """The smallest integer factor that gives an image's longer side `min_side` pixels; 1 for signals.

    Of an image more than twice as wide as high (planes or frames side by side), half of the height's `min_side` counts.
    """
    return 1 if len(size) == 1 else -(-min_side // max(size[-2], min(size[-1], 2 * size[-2])))


def sample_panels(versions: Sequence[FloatArray], min_side: int) -> list[Image.Image]:
    """Draws versions of one sample alike, at least `min_side` pixels on the longer side.

    Versions are images (C, H, W) or volumes (C, D, H, W; their planes) in [0, 1], or signals (C, L), all drawn in the
    range of the last version, which has nothing masked.
    """
    if versions[0].ndim == 4:
        versions = [Look("volume").flat(volume[None])[0] for volume in versions]
    size = versions[0].shape[1:]
    if len(size) == 1:
        return _signal_panels(versions, min_side)
    return [_image_panel(image, panel_scale(size, min_side)) for image in versions]


def _image_panel(image: FloatArray, scale: int) -> Image.Image:
    """An image: one or two channels grey, the first three of more as RGB."""
    empty: BoolArray = np.asarray(np.isinf(image).any(axis=0))
    known = np.nan_to_num(image, nan=0.5, posinf=1)  # a value masked in one channel alone
    channels = known[:3] if len(known) >= 3 else known.mean(axis=0, keepdims=True).repeat(3, axis=0)
    pixels = np.round(channels.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    pixels[_is_masked(image)] = MASKED
    return _with_gaps(pixels, empty, scale)


def _with_gaps(pixels: npt.NDArray[np.uint8], empty: BoolArray, scale: int = 1) -> Image.Image:
    """(H, W, 3) as a picture, `scale` times as large, transparent where it is `empty`."""
    if empty.any():
        pixels = np.dstack([np.where(empty[..., None], 255, pixels), np.where(empty, 0, 255)]).astype(np.uint8)
    return Image.fromarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1))


def map_panel(colours: FloatArray, size: tuple[int, int]) -> Image.Image:
    """Colours, (rows, columns, 3) or of a strip (columns, 3), in [0, 1], enlarged without smoothing to `size`.

    `size` is width and height in pixels.
    """
    flat = colours.reshape(-1, *colours.shape[-2:])
    empty: BoolArray = np.asarray(~np.isfinite(flat).all(axis=-1))
    pixels = np.round(np.where(empty[..., None], 0, flat) * 255).astype(np.uint8)
    return _with_gaps(pixels, empty).resize(size, Image.Resampling.NEAREST)


def heat(values: FloatArray, palette: str = "viridis") -> FloatArray:
    """Values in [0, 1] as colours of a matplotlib palette, dark to bright: (...) to (..., 3) in [0, 1].

    What is not finite stays so.
    """
    from matplotlib import colormaps

    colours = np.asarray(colormaps[palette](values)[..., :3], dtype=np.float32)
    return np.where(np.isfinite(values)[..., None], colours, np.inf).astype(np.float32)


def draw_table(
    rows: Sequence[Sequence[Image.Image | None]],
    headers: Sequence[str] = (),
    *,
    font: Font | None = None,
    size: tuple[int, int] | None = None,
    captions: Sequence[Sequence[str]] = (),
    column_gaps: Collection[int] = (),
    row_gaps: Collection[int] = (),
    kind: str = "image",
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
        kind: of samples, for the words of headers and `info`.
        **info: text fields of the picture, such as Title and Description.
    """
    headers = [in_words(header, kind) for header in headers]
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
    picture.info.update({key: in_words(text, kind) for key, text in info.items()})
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
    """Signals (C, L) as a line for each channel, one below the other, each in the range that it has in the last signal.

    Grey where all channels are masked.
    """
    known = np.where(np.isfinite(signals[-1]), signals[-1], np.nan)
    empty = np.isnan(known).all(axis=1)
    known[empty] = 0
    lows, highs = np.nanmin(known, axis=1), np.nanmax(known, axis=1)
    margins = np.where(highs > lows, 0.06 * (highs - lows), 0.5)
    lows, highs = lows - margins, highs + margins
    row = max(min_side // len(known), _LEAST_ROW)
    width, height = _SIGNAL_ASPECT * min_side, max(min_side, row * len(known))
    panels = []
    for signal in signals:
        columns = (np.arange(width) * signal.shape[1]) // width  # one column of pixels shows the samples around it
        pixels = np.full((height, width, 3), _SIGNAL_BACKGROUND, dtype=np.uint8)
        pixels[:, _is_masked(signal)[columns]] = MASKED
        without_data: BoolArray = np.asarray(np.isposinf(signal).all(axis=0))[columns]
        panels.append(_with_gaps(pixels, np.broadcast_to(without_data, (height, width))))
        pen = ImageDraw.Draw(panels[-1])
        x = (np.arange(signal.shape[1]) + 0.5) * width / signal.shape[1]
        for number, (channel, low, high) in enumerate(zip(signal, lows, highs, strict=True)):
            top, extent = height * number / len(signal), height / len(signal) - 1
            y = top + ((high - channel.clip(low, high)) / (high - low)) * extent
            for start, stop in _visible_spans(channel):
                points = [(float(x[i]), float(y[i])) for i in range(start, stop)]
                line = 2 if row > _LEAST_ROW else 1
                pen.line(points * 2 if len(points) == 1 else points, fill=_SIGNAL_COLOUR, width=line)
    return panels


def _visible_spans(channel: FloatArray) -> list[tuple[int, int]]:
    """[start, stop) of each run of samples that are finite."""
    known = np.concatenate([[False], np.isfinite(channel), [False]])
    edges = np.flatnonzero(known[1:] != known[:-1])
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
