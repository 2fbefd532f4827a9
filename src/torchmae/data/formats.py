"""Formats of encoded files: a row of `FORMATS` opens such a file as an `Item`; docs/extending.md adds one."""

from __future__ import annotations

import io
import re
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags
from PIL import Image as Pillow

from torchmae.data import jpeg
from torchmae.data.items import (
    CUT_SHORT,
    ArrayItem,
    Context,
    Image,
    Item,
    Region,
    WithChannels,
    check_pixels,
    one_line_errors,
    prepared,
)
from torchmae.errors import DataError

MAX_BYTES = 512 * 2**20  # of an image file: as many as a hundred million pixels seldom take
TOO_LARGE = f"the file has more than {MAX_BYTES // 2**20:,} MiB"
PACKED_ARRAY = ".sample.npy"  # the end of the name of an array that is one sample, wherever it lies
CHANNELS = "channels"  # the one field of a .npy file that was packed: its last axis is channels
MAX_HEADER = 16 * 2**20  # bytes that may stand before the values of a file

_NO_IMAGE = "not an image, or cut short before its first pixel"
_HEAD = 512  # bytes at the start of a file that tell its format
ON_WHITE = "transparency laid on white"
_JPEG_OVER_LIMIT = 10  # a JPEG may have so many times the limit of pixels: it is read at a fraction of its size
_PIXELS_PER_BYTE = 200  # of a JPEG, at most: its blocks of 64 pixels take two bits or more


class Format(NamedTuple):
    """One kind of encoded file. Rows from outside travel to worker processes, by pickle where those are not forked."""

    suffixes: tuple[str, ...]  # in lower case, with the dot; files that are packed get the first
    magic: bytes | None  # a regular expression that such files begin with; None: only their names tell
    open: Callable[[Any, Context], Item]  # makes an item of the whole content, in bytes; DataError with the reason
    needs: tuple[str, str] | None = None  # a module, and what installs it: ("pillow_heif", "torchmae[heif]")
    in_place: bool = False  # whether `open` takes the `Path` of a local file too, and reads no more of it than needed
    dims: tuple[int, ...] = (2,)  # how many spatial axes such samples may have

    def missing(self) -> str | None:
        """What to install before such files can be read; None: nothing."""
        return None if self.needs is None or find_spec(self.needs[0]) else self.needs[1]


def open_item(content: bytes | Path | tuple[Path, ...], context: Context, name: Callable[[], str] = str) -> Item:
    """Opens one encoded file, known by its content or else its `name`; DataError with the reason, without the name.

    `content` is that of the file, its path, or the paths of several files that are one sample.
    """
    data, form = content, None
    if isinstance(content, bytes):
        form = format_of(content, name)
    else:
        with regular_file(content if isinstance(content, Path) else content[0]) as file:
            form = format_of(file.read(_HEAD), name)
            if form is None or not form.in_place:
                file.seek(0)
                data = _whole(file)
    if not data:
        raise DataError("the file is empty")
    if isinstance(data, bytes) and len(data) > MAX_BYTES:
        raise DataError(TOO_LARGE)
    if form is None:
        raise DataError(_NO_IMAGE)
    with one_line_errors():
        if missing := form.missing():
            raise DataError(f"a {form.suffixes[0]} file needs an extra", f"pip install '{missing}'")
        stored = context if context.channels is None else replace(context, num_channels=None)
        item = prepared(form.open(data, stored), context)
        return item if context.num_channels in (None, item.channels) else WithChannels(item, context.num_channels)


@contextmanager
def regular_file(path: Path) -> Iterator[BinaryIO]:
    """A file on a disk, opened; DataError: it is not there, cannot be read, or is a pipe or a device."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a pipe would block, a device never end
            raise DataError("no regular file")
        with path.open("rb") as file:
            yield file
    except (OSError, ValueError) as error:  # ValueError: a null byte in a path
        raise DataError(getattr(error, "strerror", None) or str(error)) from None


def read_file(path: Path) -> bytes:
    """The content of a file on a disk; DataError as for `regular_file`, or more than MAX_BYTES."""
    with regular_file(path) as file:
        return _whole(file)


def _whole(file: BinaryIO) -> bytes:
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise DataError(TOO_LARGE)
    return data


def opened(file: bytes | Path) -> BinaryIO:
    """The file at a path, or the content of one, to read from."""
    return file.open("rb") if isinstance(file, Path) else io.BytesIO(file)


def format_of(data: bytes, name: Callable[[], str] = str) -> Format | None:
    """The format of a file by its first bytes, else by the suffix of its name; None where neither is known."""
    for form in FORMATS.values():
        if form.magic is not None and re.match(form.magic, data, re.DOTALL):
            return form
    others = [form for form in FORMATS.values() if form.magic is None]
    lower = name().lower() if others else ""
    return next((form for form in others if lower.endswith(form.suffixes)), None)


def picture_suffixes(dims: int | None = None) -> tuple[str, ...]:
    """The suffixes of files that are samples wherever they lie: no arrays, and no formats whose library is missing.

    With `dims`, of those that may have so many spatial axes.
    """
    forms = (form for name, form in FORMATS.items() if name != "npy" and not form.missing())
    fitting = (form for form in forms if dims is None or dims in form.dims)
    return (*(suffix for form in fitting for suffix in form.suffixes), PACKED_ARRAY)


def missing_extra(suffix: str) -> str | None:
    """What to install for files with this suffix, such as "torchmae[heif]"; None: nothing is missing, or helps."""
    return next((form.missing() for form in FORMATS.values() if suffix.lower() in form.suffixes), None)


class JpegItem(Item):
    """A JPEG file, of which `read` decodes no more than is asked for; Pillow does where the others cannot."""

    reduces = True

    def __init__(self, data: bytes, context: Context) -> None:
        self._data = data
        self._keep = context.truncated == "keep"
        self._orientation, self._reduction = 1, 1
        self._header = jpeg.read_header(data)
        notes: list[str] = []
        if self._header is not None and jpeg.is_upright(data):
            height, width, grey = self._header
        else:
            image = open_pillow(data, "JPEG")
            self._orientation = _orientation(image)
            width, height = image.size
            grey = image.mode == "L"
            if image.mode == "CMYK":
                notes.append("CMYK as RGB" if "adobe" in image.info else "CMYK without Adobe's mark, taken as inverted")
            if image.mode not in ("L", "RGB") or self._header != (height, width, grey):
                self._header = None
        pixels = height * width
        if not 0 < pixels <= context.max_pixels:
            genuine = 0 < pixels <= min(_PIXELS_PER_BYTE * len(data), _JPEG_OVER_LIMIT * context.max_pixels)
            if not genuine or jpeg.is_progressive(data):  # the decoder holds all of a progressive one
                check_pixels((height, width), context)
            self._reduction = next(factor for factor in (2, 4, 8) if pixels <= context.max_pixels * factor**2)
            notes.append(f"above {context.max_megapixels:g} megapixels: read at 1/{self._reduction} of its size")
            height, width = -(-height // self._reduction), -(-width // self._reduction)
        if context.num_channels == 1 and not grey:
            self._header = None  # Pillow makes colour grey
        size = (height, width) if self._orientation < 5 else (width, height)
        super().__init__(size, 1 if grey or context.num_channels == 1 else 3, np.uint8, form="JPEG", notes=tuple(notes))
        self.reduces = self._reduction == 1  # the decoder goes to 1/8 at most, and has used up a part of that

    def read(self, region: Region | None = None, reduction: int = 1) -> Image:
        with one_line_errors():
            if region is None:
                return self._read_whole(reduction)
            in_colour = self._header is not None and not self._header.grey
            lengths = tuple(length for _, length in region)
            if in_colour and self._orientation == self._reduction == 1 and lengths != self.size:
                part = jpeg.read_region(self._data, region)
                if part is not None:
                    return part
            return self._read_whole(1)[tuple(slice(start, start + length) for start, length in region)]

    def _read_whole(self, reduction: int) -> Image:
        factor = min(8, self._reduction * reduction)
        if self._header is not None:
            pixels = jpeg.read_whole(self._data, self._header, factor)
            if pixels is not None:
                return np.ascontiguousarray(upright(pixels, self._orientation))
        if self._keep and not jpeg.is_whole(self._data):
            self._data += jpeg.END_OF_IMAGE  # after which the decoder takes what is missing for grey
        with open_pillow(self._data, "JPEG") as image:
            image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))
            return np.ascontiguousarray(_pixels(image, self.channels))


def open_pillow(data: bytes, form: str) -> Pillow.Image:
    """A picture of one of Pillow's formats, its header read; the caller checks how many pixels it has."""
    if form not in Pillow.OPEN:
        Pillow.init()
    with suppress(SyntaxError, IndexError, TypeError, struct.error):  # what Pillow's own `open` passes over
        # That one also holds every picture against a limit of its own, which only a process can raise.
        image: Pillow.Image = Pillow.OPEN[form][0](io.BytesIO(data), "")
        return image
    raise DataError(_NO_IMAGE)


def pillow_format(form: str) -> Callable[[bytes, Context], Item]:
    """An opener of pictures that Pillow decodes."""
    return lambda data, context: loaded_item(open_pillow(data, form), context)


def loaded_item(image: Pillow.Image, context: Context, notes: Sequence[str] = ()) -> Item:
    """The item of a picture that Pillow has opened, whatever its format; decoded here, after its size was checked."""
    check_pixels((image.height, image.width), context)
    found, form = list(notes), image.format or "unknown"
    if getattr(image, "is_animated", False):
        found.append("the first frame of an animation")
    pixels = _pixels(image, context.num_channels)
    if image.has_transparency_data:
        found.append(ON_WHITE)
    return ArrayItem(pixels, form=form, notes=found)


def _open_png(data: bytes, context: Context) -> Item:
    """A PNG picture; what is not pixels is left out, so that no damage of it counts."""
    kept, position = [data[:8]], 8
    while position + 8 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"):
            kept.append(data[position:end])
        position = end
    data = b"".join(kept)
    image = open_pillow(data, "PNG")
    depth, colour = (data[24], data[25]) if data[12:16] == b"IHDR" else (8, 2)
    if depth != 16 or colour not in (2, 4, 6):
        return loaded_item(image, context)
    check_pixels((image.height, image.width), context)  # Pillow would drop the lower bits
    import torch
    from torchvision.io import ImageReadMode, decode_png

    stored = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    pixels = upright(np.moveaxis(stored.numpy(), 0, -1).astype(np.uint16), _orientation(image))
    return _opaque(pixels, colour in (4, 6), "PNG")


def upright(pixels: Image, orientation: int) -> Image:
    """(height, width, channels) as an EXIF orientation, 1 to 8, asks; from 5 on, height and width change places."""
    turned = pixels.swapaxes(0, 1) if orientation >= 5 else pixels
    return turned[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]


def _opaque(pixels: Image, last_is_opacity: bool, form: str, notes: Sequence[str] = ()) -> Item:
    if not last_is_opacity:
        return ArrayItem(pixels, form=form, notes=notes)
    return ArrayItem(on_white(pixels[..., :-1], pixels[..., -1]), form=form, notes=[*notes, ON_WHITE])


def on_white(pixels: Image, opacity: Image, *, premultiplied: bool = False) -> Image:
    """Lays pixels, (*size, C) integers or floats up to 1, on white by their `opacity`, (*size) of the same type."""
    top = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "ui" else 1.0
    share = opacity[..., None].astype(np.float64) / top
    mixed = (pixels if premultiplied else pixels * share) + top * (1 - share)
    return (np.rint(mixed).clip(0, top) if pixels.dtype.kind in "ui" else mixed).astype(pixels.dtype)


def _open_pnm(data: bytes, context: Context) -> Item:
    """Portable maps; of more than 8 bits the values are kept as they are, which Pillow scales or cuts."""
    header = re.match(rb"P([56])(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)\s", data[:4096])
    if header is None or int(header[4]) <= 255:
        return loaded_item(open_pillow(data, "PPM"), context)
    kind, width, height, _ = map(int, header.groups())
    check_pixels((height, width), context)
    shape = (height, width, 3 if kind == 6 else 1)
    if len(data) - header.end() < 2 * np.prod(shape):
        raise DataError(f"{CUT_SHORT}: the file ends before its pixels do")
    return ArrayItem(np.ndarray(shape, ">u2", data, header.end()), form="PPM")


def _open_heif(data: bytes, context: Context) -> Item:
    import pillow_heif

    file = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
    width, height = file.size
    check_pixels((height, width), context)
    notes = [f"picture 1 of {len(file)}"] if len(file) > 1 else []
    if "16" in file.mode:
        pixels = np.asarray(file).reshape(height, width, -1)
        return _opaque(pixels, file.mode.startswith(("RGBA", "LA")), "HEIF", notes)
    image = file.to_pillow()
    image.format = "HEIF"
    return loaded_item(image, context, notes)


def _open_avif(data: bytes, context: Context) -> Item:
    box = data.find(b"av1C", 0, 4096)  # its third byte holds the flag of more than 8 bits
    deep = box >= 0 and data[box + 6] & 0x40
    return loaded_item(open_pillow(data, "AVIF"), context, ["10 or 12 bits read as 8"] if deep else [])


def _open_gif(data: bytes, context: Context) -> Item:
    """The first frame, or all frames as a clip where samples have three axes."""
    if context.spatial_dims == 3 and not FORMATS["video"].missing():
        return FORMATS["video"].open(data, context)
    return pillow_format("GIF")(data, context)


def _opener(module: str, name: str) -> Callable[[Any, Context], Item]:
    """An opener of `torchmae.data`, whose module is imported when the first such file is opened."""
    return lambda file, context: getattr(import_module(f"torchmae.data.{module}"), name)(file, context)


def _open_npy(data: bytes, context: Context) -> Item:
    from torchmae.data.arrays import read_npy, sample_axes

    values = read_npy(data)
    if values.dtype.names == (CHANNELS,):
        return ArrayItem(values[CHANNELS])
    axis, note = sample_axes(values.shape, context, "the array")
    return ArrayItem(values, axis, notes=[note] if note else [])


_NIFTI = _opener("nifti", "VolumeItem"), ("nibabel", "torchmae[medical]"), True, (2, 3)
# Opens encoded files, by name. Add a row to teach every command a format.
FORMATS: dict[str, Format] = {
    "jpeg": Format((".jpg", ".jpeg", ".jfif", ".jpe"), rb"\xff\xd8", JpegItem),
    "png": Format((".png",), rb"\x89PNG\r\n\x1a\n", _open_png),
    "dicom": Format(  # before TIFF, whose first bytes may stand in the 128 that are free
        (".dcm", ".dicom"),
        rb".{128}DICM|[\x02\x08]\0.\0([A-Z]{2}|.{2}\0\0)",  # the latter: without the 128 bytes and the mark
        _opener("dicom", "open_dicom"),
        ("pydicom", "torchmae[medical]"),
        in_place=True,
        dims=(2, 3),
    ),
    "tiff": Format((".tif", ".tiff"), rb"II[*+]\0|MM\0[*+]", _opener("tiff", "open_tiff"), in_place=True, dims=(2, 3)),
    "webp": Format((".webp",), rb"RIFF.{4}WEBP", pillow_format("WEBP")),
    "gif": Format((".gif",), rb"GIF8", _open_gif, dims=(2, 3)),
    "bmp": Format((".bmp",), rb"BM", pillow_format("BMP")),
    "pnm": Format((".ppm", ".pgm", ".pbm", ".pnm"), rb"P[1-6]", _open_pnm),
    "heif": Format(
        (".heic", ".heif"), rb".{4}ftyp(hei[cxms]|hevc|mif1|msf1)", _open_heif, ("pillow_heif", "torchmae[heif]")
    ),
    "avif": Format((".avif",), rb".{4}ftypavi[fs]", _open_avif, ("PIL._avif", "pillow>=11.3")),
    "npy": Format((".npy",), rb"\x93NUMPY", _open_npy, dims=(1, 2, 3)),
    "jp2": Format(
        (".jp2",),
        rb"\0\0\0\x0cjP  \r\n\x87\n",
        _opener("geo", "open_jp2"),
        ("rasterio", "torchmae[geo]"),
        in_place=True,
    ),
    "nifti": Format((".nii",), rb".{344}n\+1\0|.{4}n\+2\0\r\n\x1a\n", *_NIFTI),
    "nifti.gz": Format((".nii.gz",), rb"\x1f\x8b", *_NIFTI),
    "audio": Format(
        (".wav", ".flac", ".ogg"),
        rb"(RIFF|RF64).{4}WAVE|fLaC|OggS",
        _opener("audio", "open_sound"),
        ("soundfile", "torchmae[audio]"),
        in_place=True,
        dims=(1,),
    ),
    "video": Format(
        (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpeg", ".mpg"),
        rb".{4}(ftyp|moov|mdat|wide|free|skip)|RIFF.{4}AVI |\x1a\x45\xdf\xa3|\0\0\x01[\xba\xb3]",
        _opener("video", "ClipItem"),
        ("av", "torchmae[video]"),
        in_place=True,
        dims=(3,),
    ),
}
BUILT_IN = dict(FORMATS)


def _pixels(image: Pillow.Image, channels: int | None) -> Image:
    """(height, width, channels) of an opened picture, upright; transparency lies on white."""
    image.load()
    orientation = _orientation(image)  # after `load`, which turns a TIFF picture itself
    if image.mode.startswith(("I", "F")):  # one channel of more than 8 bits
        return upright(np.array(image)[..., None], orientation)
    grey = channels == 1 or (channels != 3 and _is_grey(image))
    if image.has_transparency_data:
        canvas = Pillow.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    mode = "L" if grey else "RGB"
    pixels = np.array(image if image.mode == mode else image.convert(mode))  # a copy: Pillow's view is read-only
    return upright(pixels[..., None] if grey else pixels, orientation)


def _orientation(image: Pillow.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where metadata is too broken to parse."""
    with suppress(Exception):  # a damaged EXIF block fails in as many ways as a damaged file
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return value if value in range(1, 9) else 1
    return 1


def _is_grey(image: Pillow.Image) -> bool:
    if image.mode != "P":
        return image.mode in ("1", "L", "LA", "La")
    palette = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    return bool((palette == palette[:, :1]).all())
