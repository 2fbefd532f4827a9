"""Samples: what is known of one when it is opened, and how its values are read, whole or in part."""

from __future__ import annotations

import math
import os
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from torchmae.config import ReadOptions
from torchmae.data.transforms import resample_long
from torchmae.errors import DataError, nearest, reason_of

Image = npt.NDArray[Any]
Side = tuple[int, int]
Region = tuple[Side, ...]  # first index and length along each spatial axis
Valid = npt.NDArray[np.bool_]  # (*size), False where a pixel holds no data
Each = TypeVar("Each")
Progress = Callable[[str, int, int], None]  # takes the name of the work, how much is done, how much there is

IF_GENUINE = "raise data.max_megapixels if it is genuine"
NOT_FINITE = "holds values that are not finite"
CUT_SHORT = "cut short"  # the reason begins with it where a file ends before its pixels do
_IGNORE_ALL = ("ignore", None, Warning, None, 0)  # what `warnings.simplefilter("ignore")` puts first
_FINEST = 32  # pixels that one may become along an axis, at most
_BYTES_PER_PIXEL = 16  # at the limit of pixels; more pixels may not take more


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


def filled(image: Image, valid: Valid | None) -> Image:
    """The image with the mean of each channel in place of pixels without data, 0 where there are no others."""
    if valid is not None:
        mean = image[valid].mean(axis=0, dtype=np.float64) if valid.any() else np.zeros(image.shape[-1])
        image[~valid] = mean if image.dtype.kind == "f" else np.rint(mean)
    return image


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
        return filled(*self.read_valid(region))

    def read_valid(self, region: Region | None = None) -> tuple[Image, Valid | None]:
        refused = self._nodata == "none"
        image = self._item.read(None if refused else region)  # whole: a crop does not decide whether it is readable
        with np.errstate(over="ignore", invalid="ignore"):
            if isinstance(self._nodata, str) and not refused and np.isfinite(image.sum()):
                return image, None  # all of them are, and a sum takes a fraction of the time
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
    return at_spacing(NoDataItem(item, nodata) if can_have else item, context)


class ResampledItem(Item):
    """A sample at another spacing: `steps` pixels along each axis become one, antialiased, or the nearest frame."""

    def __init__(self, item: Item, steps: Sequence[float], note: str, context: Context) -> None:
        size = [max(1, int(length / step + 1e-6)) for length, step in zip(item.size, steps, strict=True)]
        meta = dict(item.meta)
        if "spacing" in meta:
            meta["spacing"] = tuple(have * step for have, step in zip(meta["spacing"], steps, strict=True))
        meta.update({name: meta[name] / steps[0] for name in ("rate", "fps") if name in meta})
        super().__init__(tuple(size), item.channels, item.dtype, item.form, item.bands, (*item.notes, note), meta)
        self._item, self._steps, self._context = item, steps, context
        self._chosen = len(size) == 3 and (isinstance(context.clip, tuple) or "fps" in meta)

    def read(self, region: Region | None = None, reduction: int = 1) -> Image:  # noqa: ARG002
        return filled(*self.read_valid(region))

    def read_valid(self, region: Region | None = None) -> tuple[Image, Valid | None]:
        region = region or tuple((0, length) for length in self.size)
        check_values([length for _, length in region], self.channels, self.dtype, self._context)
        outer: list[Side] = []  # the region and what its edges depend on, first and last, in these pixels
        source: list[Side] = []  # the same in the sample's
        for axis, (start, length) in enumerate(region):
            step, here, there = self._steps[axis], self.size[axis], self._item.size[axis]
            is_filtered = step != 1 and not (self._chosen and axis == 0)
            margin = math.ceil(2 * max(1, 1 / step)) + 1 if is_filtered else 0
            first, last = max(0, start - margin), min(here, start + length + margin)
            outer.append((first, last))
            low = min(there - 1, int(first * step))
            source.append((low, max(1, min(there, math.ceil(last * step)) - low)))
        image, valid = self._item.read_valid(tuple(source))
        if valid is None:
            return self._stored(self._along(image, region, outer, source)), None
        share = self._along(valid[..., None], region, outer, source)
        sums = self._along(np.where(valid[..., None], image, 0), region, outer, source)
        kept: Valid = share[..., 0] > 0.5
        return self._stored(np.where(kept[..., None], sums / np.where(share > 0.5, share, 1), 0)), kept

    def _along(self, image: Image, region: Region, outer: Sequence[Side], source: Sequence[Side]) -> Image:
        """The values of a region, of those of `source`, an axis after the other."""
        for axis, step in enumerate(self._steps):
            if step == 1:
                continue
            (start, length), (first, last), (low, have) = region[axis], outer[axis], source[axis]
            if self._chosen and axis == 0:
                places = ((start + np.arange(length) + 0.5) * step).astype(np.int64) - low
                image = image[places.clip(0, have - 1)]
                continue
            moved = np.moveaxis(image, axis, -1)
            rows = torch.from_numpy(np.ascontiguousarray(moved, np.float32)).view(1, -1, have)
            box = np.array([[first * step - low, (last - first) * step]])
            found = resample_long(rows, box, last - first).view(*moved.shape[:-1], last - first).numpy()
            image = np.moveaxis(found[..., start - first : start - first + length], -1, axis)
        return image

    def _stored(self, values: Image) -> Image:
        if self.dtype.kind == "u" and values.dtype.kind == "f":
            values = np.rint(values).clip(0, np.iinfo(self.dtype).max)
        return np.ascontiguousarray(values, self.dtype)


def at_spacing(item: Item, context: Context) -> Item:
    """The item at the spacing and with the stride that the context asks for."""
    clip, wanted = context.clip, context.spacing
    stride = clip[1] if isinstance(clip, tuple) else 1
    steps, notes = [1.0] * len(item.size), []
    if not isinstance(wanted, str):
        pace = next((name for name in ("rate", "fps") if name in item.meta), None)
        if "spacing" not in item.meta:
            raise DataError("does not say its spacing", "leave data.spacing out")
        if pace is not None and isinstance(wanted, tuple):
            raise DataError(f"is sampled along time, and data.spacing has {len(wanted)} numbers", "give one")
        if pace is not None and "fps" not in item.meta and len(steps) > 1:  # a spectrogram of what was resampled
            return item
        if pace is not None:
            steps[0] = item.meta[pace] / wanted
            notes.append(f"{wanted:g} {'Hz' if pace == 'rate' else 'frames a second'}")
        else:
            each = wanted if isinstance(wanted, tuple) else (wanted,) * len(steps)
            if len(each) != len(steps):
                raise DataError(f"has {len(steps)} axes and data.spacing {len(each)} numbers", "give one for each")
            steps = [to / have for to, have in zip(each, item.meta["spacing"], strict=True)]
            notes.append(f"a spacing of {' x '.join(f'{length:g}' for length in each)}")
    if stride > 1:
        steps[0] *= stride
        notes.append(f"one in {stride} along time")
    if all(abs(step - 1) < 1e-6 for step in steps):
        return item
    if not all(1 / _FINEST <= step < math.inf for step in steps):  # a file may state any spacing
        raise DataError(f"data.spacing is less than a {_FINEST}th of its own", "give a larger data.spacing")
    return ResampledItem(item, steps, f"resampled to {', '.join(notes)}", context)


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
        self._lock = threading.Lock()  # windows of one image are read by several threads, which share its handle

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
        with self._lock, one_line_errors():
            values = self._take(region)
        if values.shape != (*lengths, self.channels):
            raise DataError(f"{CUT_SHORT}: the file ends before its values do")
        is_own = values.base is None and values.dtype == self.dtype and values.flags.c_contiguous
        return values if is_own else plain_type(values)


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
