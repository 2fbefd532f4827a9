"""One image, signal or map as a small picture: what larger pictures are put together from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    import torch

    Images: TypeAlias = npt.NDArray[np.floating] | torch.Tensor

FloatArray: TypeAlias = npt.NDArray[np.float32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

# What is hidden: a mid-grey with a touch of blue, so that neither black nor a grey of the picture passes for it.
HIDDEN = (116, 124, 138)
# Transparent; white where a viewer knows no transparency.
BACKGROUND = (255, 255, 255, 0)
# Readable on white and on near-black alike, for the pictures' own background is transparent.
TEXT = (118, 122, 128, 255)
_SIGNAL_COLOUR = (11, 95, 174)
_SIGNAL_BACKGROUND = 246
# Width over height of the panel of a 1-D signal.
_SIGNAL_ASPECT = 3


def as_numpy(images: Images) -> FloatArray:
    """Float32 on the processor, from a tensor or an array."""
    if isinstance(images, np.ndarray):
        return images.astype(np.float32)
    array: FloatArray = images.detach().float().cpu().numpy()
    return array


def panel_scale(size: Sequence[int], min_side: int) -> int:
    """The whole factor by which an image grows until its longer side has `min_side` pixels.

    Args:
        size: along each spatial axis; a signal is drawn, not enlarged, and of a volume only two axes are seen.
        min_side: pixels.
    """
    return 1 if len(size) == 1 else -(-min_side // max(size[-2:]))


def image_panel(image: FloatArray, scale: int = 1) -> Image.Image:
    """An image, or the middle slice of a volume, as RGB.

    One channel is drawn grey, two as the grey of their mean, three as RGB, more as the RGB of the first three.

    Args:
        image: (C, H, W) or (C, D, H, W) in [0, 1]; NaN where hidden.
        scale: by how much it is enlarged, without smoothing.
    """
    flat = image[:, image.shape[1] // 2] if image.ndim == 4 else image
    pixels = _enlarge(_to_rgb(flat), scale)
    pixels[_enlarge(_is_hidden(flat), scale)] = HIDDEN
    return Image.fromarray(pixels)


def sample_panels(versions: Sequence[FloatArray], min_side: int) -> list[Image.Image]:
    """Versions of one sample, drawn alike, at least `min_side` pixels on the longer side.

    Args:
        versions: images (C, H, W) or volumes (C, D, H, W) in [0, 1], or signals (C, L), all on the scale of the last;
            NaN where hidden, but for the last.
        min_side: pixels.
    """
    size = versions[0].shape[1:]
    if len(size) == 1:
        return _signal_panels(versions, min_side)
    return [image_panel(image, panel_scale(size, min_side)) for image in versions]


def map_panel(colours: FloatArray, size: tuple[int, int]) -> Image.Image:
    """A map over patches, stretched without smoothing to stand beside an image.

    Args:
        colours: (*grid, 3) in [0, 1]; of three axes the middle of the first is drawn, one axis is a strip.
        size: width and height in pixels.
    """
    flat = colours[colours.shape[0] // 2] if colours.ndim == 4 else colours.reshape(-1, *colours.shape[-2:])
    pixels = np.round(flat * 255).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def heat(values: FloatArray, palette: str = "viridis") -> FloatArray:
    """Values in [0, 1] as colours of a matplotlib palette, dark to bright: (...) to (..., 3) in [0, 1]."""
    from matplotlib import colormaps

    return np.asarray(colormaps[palette](values)[..., :3], dtype=np.float32)


def _is_hidden(masked: FloatArray) -> BoolArray:
    """(C, *size) to (*size): where no channel is seen."""
    hidden: BoolArray = np.asarray(np.isnan(masked).all(axis=0))
    return hidden


def _enlarge(pixels: npt.NDArray[np.generic], factor: int) -> npt.NDArray[np.generic]:
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def _to_rgb(image: FloatArray) -> npt.NDArray[np.uint8]:
    """(C, H, W) in [0, 1] to (H, W, 3) bytes; a hidden value becomes one half."""
    known = np.nan_to_num(image, nan=0.5)
    channels = known[:3] if len(known) >= 3 else known.mean(axis=0, keepdims=True).repeat(3, axis=0)
    return np.round(channels.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)


def _signal_panels(signals: Sequence[FloatArray], min_side: int) -> list[Image.Image]:
    """Signals (C, L) as lines, one for each channel, on the scale of the last; grey where they are NaN."""
    low, high = float(signals[-1].min()), float(signals[-1].max())
    margin = 0.06 * (high - low) or 0.5
    size = (_SIGNAL_ASPECT * min_side, min_side)
    return [_signal_panel(signal, size, low - margin, high + margin) for signal in signals]


def _signal_panel(signal: FloatArray, size: tuple[int, int], low: float, high: float) -> Image.Image:
    """One signal as lines, one for each channel, with grey where it is hidden; `size` is width and height."""
    width, height = size
    hidden = _is_hidden(signal)
    # One column of pixels shows the samples around it.
    samples = (np.arange(width) * len(hidden)) // width
    pixels = np.full((height, width, 3), _SIGNAL_BACKGROUND, dtype=np.uint8)
    pixels[:, hidden[samples]] = HIDDEN
    panel = Image.fromarray(pixels)
    pen = ImageDraw.Draw(panel)
    x = (np.arange(len(hidden)) + 0.5) * width / len(hidden)
    for channel in signal:
        y = ((high - channel.clip(low, high)) / (high - low)) * (height - 1)
        for start, stop in _visible_spans(channel):
            points = [(float(x[i]), float(y[i])) for i in range(start, stop)]
            if len(points) == 1:
                points.append(points[0])
            pen.line(points, fill=_SIGNAL_COLOUR, width=2)
    return panel


def _visible_spans(channel: FloatArray) -> list[tuple[int, int]]:
    """Where a signal is no NaN: [start, stop) of each run of samples."""
    known = np.concatenate([[False], ~np.isnan(channel), [False]])
    edges = np.flatnonzero(known[1:] != known[:-1])
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
