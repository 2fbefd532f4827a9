"""Formats of encoded files: a row of `FORMATS` opens such a file as an `Item`; docs/extending.md adds one."""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import ExifTags
from PIL import Image as Pillow

from torchmae.config import ReadOptions
from torchmae.data import jpeg
from torchmae.errors import DataError, nearest, reason_of

Image = npt.NDArray[Any]
Region = tuple[tuple[int, int], ...]  # first index and length along each spatial axis
Valid = npt.NDArray[np.bool_]  # (*size), False where a pixel holds no data
Each = TypeVar("Each")
Progress = Callable[[str, int, int], None]  # takes the name of the work, how much is done, how much there is

MAX_BYTES = 512 * 2**20  # of an image file: as many as a hundred million pixels seldom take
TOO_LARGE = f"the file has more than {MAX_BYTES // 2**20:,} MiB"
IF_GENUINE = "raise data.max_megapixels if it is genuine"
NOT_FINITE = "holds values that are not finite"
CUT_SHORT = "cut short"  # the reason begins with it where a file ends before its pixels do
PACKED_ARRAY = ".sample.npy"  # the end of the name of an array that is one sample, wherever it lies
CHANNELS = "channels"  # the one field of a .npy file that was packed: its last axis is channels
MAX_HEADER = 16 * 2**20  # bytes that may stand before the values of a file

_IGNORE_ALL = ("ignore", None, Warning, None, 0)  # what `warnings.simplefilter("ignore")` puts first
_NO_IMAGE = "not an image, or cut short before its first pixel"
_HEAD = 512  # bytes at the start of a file that tell its format
_BYTES_PER_PIXEL = 16  # at the limit of pixels; more pixels may not take more
ON_WHITE = "transparency laid on white"
_JPEG_OVER_LIMIT = 10  # a JPEG may have so many times the limit of pixels: it is read at a fraction of its size
_PIXELS_PER_BYTE = 200  # of a JPEG, at most: its blocks of 64 pixels take two bits or more


def tracked(items: Iterable[Each], progress: Progress | None, what: str, total: int, done: int = 0) -> Iterator[Each]:
    """The items as they come; `progress` hears after each how many were worked on."""
    for number, item in enumerate(items, done + 1):
        yield item
        if progress is not None:
            progress(what, number, total)


@dataclass(frozen=True)
class Context(ReadOptions):
    """All that decides how data is opened, beside where it is. One object, so that no caller forgets a part."""

    num_channels: int | None = None  # that samples are to have; None: what each has
    spatial_dims: int | None = None  # how many axes of a sample are spatial, 1 to 3; None: as its shape suggests
    page: int = 0  # the page to read, from 0, of a file with several, unless `pages` asks for a stack
    progress: Progress | None = None  # told how far opening is; worker processes do not keep it

    @classmethod
    def of(cls, options: ReadOptions, **given: Any) -> Context:
        """The context of a command's options; `given` are the fields named above."""
        return cls(**{item.name: getattr(options, item.name) for item in fields(ReadOptions)}, **given)

    @property
    def max_pixels(self) -> int:
        """Largest number of pixels that a picture may have."""
        return int(self.max_megapixels * 1e6)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "progress": None}


@dataclass(eq=False)
class Item(ABC):
    """One sample that was opened: its header, and its values when they are asked for."""

    size: tuple[int, ...]  # length of each spatial axis, as `read` gives them
    channels: int  # values at each place
    dtype: Any  # of what `read` gives: uint8, uint16 or float32
    form: str = "array"  # the name of its format, for people
    bands: tuple[str, ...] = ()  # the name of each channel, where the file says
    notes: tuple[str, ...] = ()  # what was decided about it, or left out of it, a short phrase each
    meta: dict[str, Any] = field(default_factory=dict)  # whatever else the file says of itself

    reduces = False  # whether `read` decodes a fraction of the size for less than the whole takes

    def __post_init__(self) -> None:
        self.size, self.bands, self.notes = tuple(self.size), tuple(self.bands), tuple(self.notes)
        self.dtype = np.dtype(self.dtype)

    @abstractmethod
    def read(self, region: Region | None = None, reduction: int = 1) -> Image:
        """The values of a region (None: all), (*size, channels) of `dtype`, an array of the caller's own.

        `reduction` is 1, 2, 4 or 8, and 1 with a region: where `reduces`, the result has 1/reduction of the size,
        rounded up, along each axis; elsewhere the full size. DataError: the values cannot be read; damage outside of
        the region may go unseen.
        """

    def read_valid(self, region: Region | None = None) -> tuple[Image, Valid | None]:
        """The values of a region, and which of its pixels hold data (None: all); the other values mean nothing."""
        return self.read(region), None


class ArrayItem(Item):
    """A sample whose values lie in an array, or can be read as one: mapped, in HDF5, decoded before.

    `values` is anything with `shape`, `dtype` and indexing, of any integers, floats or bool: the sample, or many, of
    which this is the one at `place`. Without a `channel_axis` the sample has one channel. `facts` are as for `Item`.
    """

    def __init__(self, values: Any, channel_axis: int | None = -1, *, place: int | None = None, **facts: Any) -> None:
        shape = list(values.shape) if place is None else list(values.shape[1:])
        self._axis = None if channel_axis is None else channel_axis % len(shape)
        channels = 1 if self._axis is None else shape.pop(self._axis)
        super().__init__(tuple(shape), channels, stored_type(values.dtype), **facts)
        self.notes += _type_notes(values.dtype)
        self._values = values
        self._place = () if place is None else (place,)

    def read(self, region: Region | None = None, reduction: int = 1) -> Image:  # noqa: ARG002
        """As in `Item`."""
        part = () if region is None else tuple(slice(start, start + length) for start, length in region)
        return plain_type(self._take(part))

    def _take(self, part: tuple[slice, ...]) -> Image:
        """(*size, channels) of a part, in the type that it is stored in."""
        if self._axis is None:
            return np.asarray(self._values[(*self._place, *part)])[..., None]
        index = [*part[: self._axis], slice(None), *part[self._axis :]] if part else []
        return np.moveaxis(np.asarray(self._values[(*self._place, *index)]), self._axis, -1)


def _type_notes(dtype: np.dtype[Any]) -> tuple[str, ...]:
    """What becomes of values of a type that is not kept."""
    is_kept = dtype.kind != "i" and dtype.itemsize <= stored_type(dtype).itemsize
    return () if is_kept else (f"{dtype.name} as float32",)


class NoDataItem(Item):
    """A sample some of whose pixels may hold no data: those with the value `nodata`, or one that is not finite.

    A pixel holds data where all its channels do. `nodata` "none": a value that is not finite makes all unreadable.
    """

    def __init__(self, item: Item, nodata: float | str) -> None:
        super().__init__(item.size, item.channels, item.dtype, item.form, item.bands, item.notes, item.meta)
        self._item, self._nodata = item, nodata

    def read(self, region: Region | None = None, reduction: int = 1) -> Image:  # noqa: ARG002
        """As in `Item`; pixels without data have the mean of the others, 0 where there are none."""
        image, valid = self.read_valid(region)
        if valid is not None:
            mean = image[valid].mean(axis=0, dtype=np.float64) if valid.any() else np.zeros(self.channels)
            image[~valid] = mean if image.dtype.kind == "f" else np.rint(mean)
        return image

    def read_valid(self, region: Region | None = None) -> tuple[Image, Valid | None]:
        refused = self._nodata == "none"
        image = self._item.read(None if refused else region)  # whole: a crop does not decide whether it is readable
        empty: Valid = ~np.isfinite(image)
        if not isinstance(self._nodata, str):
            empty |= image == (np.float32(self._nodata) if image.dtype.kind == "f" else self._nodata)
        if refused and empty.any():
            raise DataError(NOT_FINITE, "--data.nodata auto takes such pixels for no data")
        if refused and region is not None:
            return image[tuple(slice(start, start + length) for start, length in region)], None
        return image, np.logical_not(empty.any(axis=-1)) if empty.any() else None


class ChosenChannels(Item):
    """Some channels of a sample, in the order given: by name, or by number from 1; else DataError."""

    def __init__(self, item: Item, chosen: Sequence[int | str]) -> None:
        self._places = [_place_of(channel, item) for channel in chosen]
        bands = [item.bands[place] for place in self._places if item.bands]
        super().__init__(item.size, len(chosen), item.dtype, item.form, tuple(bands), item.notes, item.meta)
        self._item = item
        self.reduces = item.reduces

    def read(self, region: Region | None = None, reduction: int = 1) -> Image:
        return np.ascontiguousarray(self._item.read(region, reduction)[..., self._places])


class WindowItem(Item):
    """A region of a sample as one of its own."""

    def __init__(self, item: Item, region: Region) -> None:
        lengths = tuple(length for _, length in region)
        super().__init__(lengths, item.channels, item.dtype, item.form, item.bands, item.notes, item.meta)
        self._item, self._region = item, region

    def read(self, region: Region | None = None, reduction: int = 1) -> Image:  # noqa: ARG002
        return self._item.read(self._within(region))

    def read_valid(self, region: Region | None = None) -> tuple[Image, Valid | None]:
        return self._item.read_valid(self._within(region))

    def _within(self, region: Region | None) -> Region:
        if region is None:
            return self._region
        pairs = zip(self._region, region, strict=True)
        return tuple((first + start, length) for (first, _), (start, length) in pairs)


def _place_of(channel: int | str, item: Item) -> int:
    if str(channel) in item.bands:
        return item.bands.index(str(channel))
    if str(channel).isdecimal() and 1 <= int(channel) <= item.channels:
        return int(channel) - 1
    near = nearest(str(channel), item.bands)
    known = f"{', '.join(item.bands)}, or 1 to {item.channels}".removeprefix(", or ")
    raise DataError(f"has no channel {channel!r}", f"{f'did you mean {near!r}? ' if near else ''}choose from {known}")


def prepared(item: Item, context: Context) -> Item:
    """The item with the channels that the context chooses, and with its pixels set apart that hold no data."""
    if context.channels is not None:
        item = ChosenChannels(item, context.channels)
    nodata: Any = context.nodata
    if "nodata" in item.meta and nodata in ("auto", "none"):
        meaning = "means no data" if nodata == "auto" else "is a value here and means no data"
        item.notes += (f"{float(item.meta['nodata']):g} {meaning}, as the file says",)
    if nodata == "auto":
        nodata = item.meta.get("nodata", "nan")
    can_have = item.dtype.kind == "f" or not isinstance(nodata, str)
    return NoDataItem(item, nodata) if can_have else item


class FileItem(Item):
    """A sample in a file of which a region is read without the rest; subclasses decode it in `_take`.

    The limits of pixels and bytes hold for what is read at a time, so that a file may be larger. `facts` are as for
    `Item`. No handle is shared by processes that are forked: each opens its own in `_open`, or for each read.
    """

    _held: tuple[int, Any] | None = None  # a process, and its handle

    def __init__(self, size: Sequence[int], channels: int, dtype: Any, context: Context, **facts: Any) -> None:
        super().__init__(tuple(size), channels, stored_type(np.dtype(dtype)), **facts)
        self.notes += _type_notes(np.dtype(dtype))
        if 0 in (*self.size, channels):
            raise DataError("it holds no values")
        self._context = context

    def _open(self) -> Any:
        """What `_handle` keeps, where a library's handle is worth keeping."""

    def _handle(self) -> Any:
        if self._held is None or self._held[0] != os.getpid():
            self._held = os.getpid(), self._open()
        return self._held[1]

    @abstractmethod
    def _take(self, region: Region) -> Image:
        """(*lengths, channels) of a region, of any type that `plain_type` takes."""

    def read(self, region: Region | None = None, reduction: int = 1) -> Image:  # noqa: ARG002
        region = region or tuple((0, length) for length in self.size)
        lengths = tuple(length for _, length in region)
        check_values(lengths, self.channels, self.dtype, self._context)
        with one_line_errors():
            values = self._take(region)
        if values.shape != (*lengths, self.channels):
            raise DataError(f"{CUT_SHORT}: the file ends before its values do")
        return plain_type(values)


class WithChannels(Item):
    """A sample with as many channels as are wanted: grey is repeated, colour becomes grey; else DataError."""

    def __init__(self, item: Item, channels: int) -> None:
        if {item.channels, channels} != {1, 3}:
            have = f"{item.channels} ({', '.join(item.bands)})" if item.bands else item.channels
            raise DataError(f"has {have} channels where {channels} are wanted")
        super().__init__(item.size, channels, item.dtype, item.form, notes=item.notes, meta=item.meta)
        self._item = item
        self.reduces = item.reduces

    def read(self, region: Region | None = None, reduction: int = 1) -> Image:
        return self._converted(self._item.read(region, reduction))

    def read_valid(self, region: Region | None = None) -> tuple[Image, Valid | None]:
        image, valid = self._item.read_valid(region)
        return self._converted(image), valid

    def _converted(self, image: Image) -> Image:
        if self.channels == 3:
            return np.repeat(image, 3, axis=-1)
        grey = image.astype(np.float64) @ (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow
        return (np.rint(grey) if image.dtype.kind == "u" else grey).astype(image.dtype)[..., None]


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


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silences Pillow's warnings, whose filters are the process's: no-op in threads; who starts those holds it."""
    is_main = threading.current_thread() is threading.main_thread()
    is_quiet = not is_main or warnings.filters[:1] == [_IGNORE_ALL]  # asking is many times faster than changing
    with nullcontext() if is_quiet else warnings.catch_warnings(action="ignore"):
        yield


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Whatever goes wrong in reading a file becomes a DataError of one line."""
    try:
        with quiet_pillow():
            yield
    except DataError:
        raise
    except Exception as error:  # decoders raise almost anything on a damaged file
        reason = reason_of(error)
        raise DataError(f"{CUT_SHORT}: {reason}" if "truncated" in reason.lower() else reason) from None


def check_pixels(size: Sequence[int], context: Context) -> None:
    """DataError for more pixels than `context.max_pixels`, or none."""
    if not 0 < np.prod(size, dtype=np.float64) <= context.max_pixels:
        sides = " x ".join(str(length) for length in reversed(size))
        raise DataError(f"{sides} is more than {context.max_pixels:,} pixels", IF_GENUINE)


def check_values(size: Sequence[int], channels: int, dtype: np.dtype[Any], context: Context) -> None:
    """As `check_pixels`, and DataError for more bytes than the limit of pixels may take."""
    check_pixels(size, context)
    if np.prod(size, dtype=np.float64) * channels * dtype.itemsize > _BYTES_PER_PIXEL * context.max_pixels:
        most = f"{_BYTES_PER_PIXEL} bytes for each of {context.max_pixels:,} pixels"
        raise DataError(f"{channels} bands of {dtype.name} take more than {most}", IF_GENUINE)


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


def stored_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type that values of `dtype` are given in: uint8 and uint16 as they are, bool as uint8, all others float32."""
    if dtype.kind not in "buif":
        raise DataError(f"holds {dtype}", "save integers or floats")
    is_small = dtype.kind in "bu" and dtype.itemsize <= 2
    return np.dtype(f"u{dtype.itemsize}" if is_small else np.float32)


def plain_type(image: Image) -> Image:
    """A contiguous copy in its `stored_type`: bool becomes 0 and 255."""
    if image.dtype.kind == "b":
        return np.ascontiguousarray(image).astype(np.uint8) * np.uint8(255)
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold is infinite, and found to be so later
        return np.array(image, dtype=stored_type(image.dtype), order="C")


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
