"""Encoded bytes to an array of integers, and what happens to a file that cannot be read."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from torchmae.data import jpeg
from torchmae.errors import ConfigError, DataError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""What counts as an image file, in lower case; case does not matter."""

MAX_PIXELS = 100_000_000
"""Width times height beyond which a file is refused: 300 MB once decoded, most likely an attack or a scan to tile."""

_HIGH_PRECISION = ("I", "F")  # Pillow's "I", "I;16", "I;16B", ... and "F": one channel of more than 8 bits
# Pillow reads many more: for some it starts other programs (Ghostscript), and few of the rest are tested as well.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_JPEG_FORMATS = ("JPEG", "MPO")  # MPO: several JPEGs in one file, as cameras write; the first counts

# What the EXIF orientations ask for, on (height, width, channels).
_UPRIGHT: dict[int, Callable[[npt.NDArray[Any]], npt.NDArray[Any]]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
_SIDEWAYS = (5, 6, 7, 8)


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silences Pillow's warnings (odd metadata, large images): a file either reads or is a DataError.

    Python's warning filters belong to the whole process, so a thread must not change them: off the main thread this
    does nothing, and whoever starts threads that decode holds it around them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decode(raw: bytes | Path, channels: int | None, max_pixels: int = MAX_PIXELS) -> npt.NDArray[Any]:
    """Decodes one image file.

    The EXIF rotation is applied, transparency is laid on white, palettes and CMYK become RGB, and of an animation
    the first frame is taken. Precision is kept where Pillow has it: 16-bit greyscale stays uint16, 32-bit float
    stays float32 (16-bit colour comes as 8 bits).

    Args:
        raw: the content of the file, or its path.
        channels: 1 for greyscale, 3 for RGB, None for what the file has (1 if greyscale, else 3).
        max_pixels: largest width times height that is accepted.

    Returns:
        (height, width, channels) uint8, uint16 or float32.

    Raises:
        DataError: the file is missing, empty, cut short, too large or no image; the path leads the message.
        ConfigError: `channels` is something else.
    """
    if isinstance(raw, bytes):
        return Picture(raw, channels, max_pixels).read()
    try:
        with _one_line_errors():
            data = raw.read_bytes()
        return Picture(data, channels, max_pixels).read()
    except DataError as error:
        raise DataError(f"{raw}: {error}") from None


class Picture:
    """An image file whose size is known before its pixels are: a JPEG is decoded by `read`, any other at once.

    JPEGs are decoded by nvImageCodec (a part of the picture) or simplejpeg where they are installed, by Pillow where
    they are not, or cannot: all are libjpeg-turbo and give the same pixels (`benchmarks/decode.py` says how fast).

    Args:
        data: the content of the file.
        channels: as in `decode`.
        max_pixels: as in `decode`.

    Attributes:
        size: height and width, after the EXIF rotation.

    Raises:
        DataError: as in `decode`.
        ConfigError: as in `decode`.
    """

    def __init__(self, data: bytes, channels: int | None, max_pixels: int = MAX_PIXELS) -> None:
        self._data = data
        self._channels = check_channels(channels)
        self._max_pixels = max_pixels
        self._orientation = 1
        self._image: Image.Image | None = None
        self._jpeg = jpeg.read_header(data) if jpeg.is_upright(data) else None
        if self._jpeg is not None and 0 < self._jpeg.height * self._jpeg.width <= max_pixels:
            self.size: tuple[int, int] = self._jpeg[:2]
            return
        with _one_line_errors():
            self._image = self._look()
        width, height = self._image.size
        self.size = (width, height) if self._orientation in _SIDEWAYS else (height, width)

    def read(self, reduction: int = 1, region: jpeg.Region | None = None) -> npt.NDArray[Any]:
        """The pixels; may be called once.

        Args:
            reduction: 1, 2, 4 or 8: decode a JPEG to 1/reduction of its size, rounded up, along each axis, which its
                inverse cosine transform does for less than the full size takes. Other formats come whole.
            region: first row, first column, height and width of the part that is wanted, in pixels of `size`; None:
                all. Not with a reduction.

        Returns:
            (height, width, channels), as from `decode`.

        Raises:
            DataError: the pixels cannot be read; damage that lies behind the region may go unseen.
        """
        with _one_line_errors():
            if region is None:
                return self._read_whole(reduction)
            part = self._read_region(region)
            if part is None:
                top, left, height, width = region
                part = self._read_whole(1)[top : top + height, left : left + width]
            return part

    def _look(self) -> Image.Image:
        """Has Pillow look at the file; what it finds decides about the other libraries."""
        image = _open(self._data, self._max_pixels)
        if image.format not in _JPEG_FORMATS:
            image.load()
            _turn_upright(image)
            return image
        self._orientation = _orientation(image)
        self._jpeg = jpeg.read_header(self._data)
        mode = "L" if self._jpeg is not None and self._jpeg.grey else "RGB"
        if self._jpeg is not None and (mode, self._jpeg.width, self._jpeg.height) != (image.mode, *image.size):
            self._jpeg = None
        return image

    def _read_region(self, region: jpeg.Region) -> npt.NDArray[Any] | None:
        """A part of the picture alone; None: it has to be decoded whole."""
        in_colour = self._jpeg is not None and not self._jpeg.grey and self._channels != 1
        if not in_colour or self._orientation != 1 or region[2:] == self.size:
            return None
        return jpeg.read_region(self._data, region)

    def _read_whole(self, reduction: int) -> npt.NDArray[Any]:
        if self._jpeg is not None and (self._jpeg.grey or self._channels != 1):
            pixels = jpeg.read_whole(self._data, self._jpeg, reduction)
            if pixels is not None:
                upright = np.ascontiguousarray(_UPRIGHT[self._orientation](pixels))
                return np.repeat(upright, 3, axis=-1) if self._jpeg.grey and self._channels == 3 else upright
        with self._image or self._look() as image:
            if image.format in _JPEG_FORMATS:
                image.draft(None, (max(1, image.width // reduction), max(1, image.height // reduction)))
                image.load()
                _turn_upright(image)
            return _pixels(image, self._channels)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Whatever goes wrong in reading a file becomes a DataError of one line."""
    try:
        with quiet_pillow():
            yield
        return
    except DataError:
        raise
    except OSError as error:
        reason = error.strerror or _one_line(error)
    except Exception as error:  # Pillow's format plug-ins raise almost anything on a damaged file
        reason = _one_line(error)
    raise DataError(reason)


def check_channels(channels: int | None) -> int | None:
    """Returns `channels`; ConfigError unless image files can be decoded to so many."""
    if channels in (None, 1, 3):
        return channels
    raise ConfigError(
        f"image files cannot give {channels} channels",
        "set model.in_chans to 1 or 3, or save the data as an array (.npy, channels last)",
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The picture, its header read."""
    if not data:
        raise DataError("the file is empty")
    try:
        image = Image.open(BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise DataError("not an image, or cut short before its first pixel") from None
    except Image.DecompressionBombError:
        raise DataError(f"more than {max_pixels:,} pixels") from None
    if image.width * image.height > max_pixels:
        raise DataError(f"{image.width} x {image.height} is more than {max_pixels:,} pixels")
    return image


def _pixels(image: Image.Image, channels: int | None) -> npt.NDArray[Any]:
    """(height, width, channels) of a loaded picture."""
    if image.mode.startswith(_HIGH_PRECISION):
        pixels = _high_precision(image)[..., None]
        return np.repeat(pixels, 3, axis=-1) if channels == 3 else pixels
    grey = channels == 1 or (channels is None and _is_grey(image))
    flat, mode = _flatten(image), "L" if grey else "RGB"
    pixels = np.array(flat if flat.mode == mode else flat.convert(mode))  # a copy: Pillow's view is read-only
    return pixels[..., None] if grey else pixels


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; metadata too broken to parse does not make the pixels unreadable."""
    with suppress(Exception):
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return value if value in _UPRIGHT else 1
    return 1


def _turn_upright(image: Image.Image) -> None:
    """Applies the EXIF rotation; metadata too broken to parse does not make the pixels unreadable."""
    with suppress(Exception):  # a damaged EXIF block fails in as many ways as a damaged file
        ImageOps.exif_transpose(image, in_place=True)


def _is_grey(image: Image.Image) -> bool:
    if image.mode != "P":
        return image.mode in ("1", "L", "LA", "La")
    palette = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    return bool((palette == palette[:, :1]).all())


def _flatten(image: Image.Image) -> Image.Image:
    """Lays a picture with transparency on white; any other is returned as it is."""
    if not image.has_transparency_data:
        return image
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas


def _high_precision(image: Image.Image) -> npt.NDArray[Any]:
    """(height, width) uint16 or float32 of a picture with one channel of more than 8 bits."""
    pixels = np.array(image)
    if image.mode == "F":
        if not np.isfinite(pixels).all():
            raise DataError("holds values that are not finite")
        return pixels.astype(np.float32)
    if image.mode == "I" and (pixels.min() < 0 or pixels.max() > 65535):
        raise DataError(f"32-bit values from {pixels.min()} to {pixels.max()} do not fit 16 bits")
    return pixels.astype(np.uint16)


class BadFiles:
    """The files that could not be read, each once, up to the share that the user allows.

    Args:
        total: how many files there are.
        max_bad: share of them that may be unreadable, in [0, 1]; 0: none, else one at least.
        option: what the user calls that share.
    """

    def __init__(self, total: int, max_bad: float, option: str = "data.max_bad") -> None:
        self.total = total
        self.max_bad = max_bad
        self.option = option
        self.limit = max(1, int(max_bad * total)) if max_bad > 0 else 0
        self._reasons: dict[str, str] = {}

    @property
    def items(self) -> list[tuple[str, str]]:
        """(name, reason) of every bad file, in the order they were met."""
        return list(self._reasons.items())

    def add(self, name: str, reason: str) -> None:
        """Counts a bad file; one that is known already is not counted again.

        Raises:
            DataError: there are now more than the limit.
        """
        self._reasons[name] = reason
        if len(self._reasons) > self.limit:
            allowed = f"more than {self.option} {self.max_bad:g} allows" if self.max_bad else f"and {self.option} is 0"
            raise DataError(
                f"{len(self._reasons)} of {self.total} images cannot be read, {allowed}; the last: {name}: {reason}",
                f"mend or remove them, or raise {self.option}",
            )
