"""TIFF files: by tifffile and imagecodecs; one page of 8 bits, grey or RGB, by Pillow."""

from __future__ import annotations

import io
import logging
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from torchmae.data import formats
from torchmae.data.geo import SceneItem
from torchmae.data.items import CUT_SHORT, ArrayItem, Context, Image, Item, check_values
from torchmae.errors import ConfigError, DataError, require

# Tags (TIFF 6.0), GDAL's, and what their values mean.
_KIND, _BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _EXTRA_SAMPLES, _FORMAT = 254, 258, 262, 274, 277, 338, 339
_NODATA = 42113
_GEOREFERENCE = {33550, 34264, 34735}  # of GeoTIFF: size of a pixel, transformation, coordinate system
_REDUCED, _IS_MASK = 1, 4  # bits of _KIND
_WHITE_IS_ZERO, _PALETTE, _CMYK = 0, 3, 5
_PREMULTIPLIED, _ALPHA = 1, 2
_NAMES = {1: "uint", 2: "int", 3: "float"}
_TAG_BYTES = {False: 12, True: 20}  # of a tag in a TIFF file, and in a BigTIFF file
_MAX_PAGES = 100_000


def open_tiff(file: bytes | Path, context: Context) -> Item:
    """A TIFF file: a page, or all as a stack, as `context` says, without previews; DataError: damaged, too large.

    A file with one page that is georeferenced is a scene where rasterio is installed (`geo`).
    """
    with formats.opened(file) as stream:
        is_plain, text, is_cut, is_scene = _read_head(stream)
    if is_scene and find_spec("rasterio"):
        return SceneItem(file, context, "GTiff")
    data = formats.read_file(file) if isinstance(file, Path) else file
    if is_cut and context.pages != "first":
        raise DataError(f"{CUT_SHORT}: the file ends before its pages do", "--data.pages first")
    if is_plain:
        return formats.loaded_item(formats.open_pillow(data, "TIFF"), context)
    try:
        library, _ = require("tifffile", "tiff"), require("imagecodecs", "tiff")
    except ConfigError as error:
        raise DataError(f"a TIFF file of {text} needs tifffile and imagecodecs", error.fix) from None
    logging.getLogger("tifffile").addHandler(logging.NullHandler())  # its remarks on odd metadata help nobody here
    with library.TiffFile(io.BytesIO(data)) as file:
        return _open(file, context)


class _Head(NamedTuple):
    """What the tags of a file say."""

    is_plain: bool  # Pillow reads all of it
    text: str  # samples, type and pages, for people
    is_cut: bool  # the file ends before its pages do
    is_scene: bool  # it is one georeferenced page of plain bands


def _read_head(file: BinaryIO) -> _Head:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(16)
    big = start[2:3] == b"+" or start[3:4] == b"+"
    pages, masks, tags, length = 0, 0, None, 0
    at = ImageFileDirectory_v2(start[: 16 if big else 8])
    order: Literal["little", "big"] = "little" if start[:2] == b"II" else "big"
    while 0 < at.next < size and pages < _MAX_PAGES:
        file.seek(at.next)
        length += _TAG_BYTES[big] * int.from_bytes(file.read(8 if big else 2), order) + 2
        if length > min(size, formats.MAX_BYTES):  # else a small file could keep a reader busy for hours
            raise DataError("its pages lead in a circle, or overlap")
        file.seek(at.next)
        at.load(file)
        kind = at.get(_KIND, 0)
        if not kind & _REDUCED:
            pages += 1
            masks += bool(kind & _IS_MASK)
            tags = dict(at) if tags is None else tags
    if tags is None:
        raise DataError("the file holds no page")
    samples, photometric = tags.get(_SAMPLES, 1), tags.get(_PHOTOMETRIC, 1)
    bits, formats_ = tags.get(_BITS, (1,)), tags.get(_FORMAT, (1,))
    plain_samples = samples == (4 if photometric == _CMYK else 3 if photometric in (2, 6) else 1)
    plain = pages == 1 and plain_samples and set(bits) <= {1, 8} and formats_[0] == 1 and not tags.get(_EXTRA_SAMPLES)
    text = f"{samples} bands, {_NAMES.get(formats_[0], 'complex ')}{bits[0]}, {pages} page{'s' if pages > 1 else ''}"
    is_scene = pages - masks == 1 and not _GEOREFERENCE.isdisjoint(tags) and photometric in (1, 2, 6)
    return _Head(plain, text, at.next >= size, is_scene)


def _open(file: Any, context: Context) -> Item:
    every = [series for series in file.series if not series.keyframe.is_reduced]
    if not every:
        raise DataError("the file holds no page")
    counts = [math.prod(length for axis, length in _axes(series) if axis not in "YXSC") for series in every]
    notes = ["reduced copies passed over"] if len(file.series) > len(every) else []
    if context.pages == "stack":
        if len(every) > 1:
            raise DataError(f"its {sum(counts)} pages differ in size or type and are no stack", "--data.pages all")
        series, page = every[0], None
    else:
        which = int(np.searchsorted(np.cumsum(counts), context.page, side="right"))
        series, page = every[which], context.page - sum(counts[:which])
        if sum(counts) > 1 and context.pages == "first":
            notes.insert(0, f"page 1 of {sum(counts)}")
    axes = [axis for axis in series.axes if page is None or axis in "YXSC"]
    size = [length for axis, length in _axes(series) if axis in axes and axis not in "SC"]
    if len(size) > 3:
        raise DataError(f"its axes are {series.axes}, more than three of space and time", "--data.pages first or all")
    samples = math.prod(length for axis, length in _axes(series) if axis in "SC")
    check_values(size, samples, series.dtype, context)
    frame = series.keyframe
    if max(map(sum, zip(frame.dataoffsets, frame.databytecounts, strict=True)), default=0) > file.filehandle.size:
        raise DataError(f"{CUT_SHORT}: the file ends before its pixels do")
    pixels, found = _in_order(_values(series, page), axes, frame)
    item = ArrayItem(pixels, form="TIFF", notes=[*notes, *found], meta={"pages": sum(counts)})
    if (tag := frame.tags.get(_NODATA)) is not None:
        value = float(str(tag.value).strip("\0 "))
        item.meta["nodata"] = "nan" if math.isnan(value) else value
    return item


def _axes(series: Any) -> list[tuple[str, int]]:
    """The letter and the length of each axis."""
    return list(zip(series.axes, series.shape, strict=True))


def _values(series: Any, page: int | None) -> Image:
    """The values of one page, or of all; in the order of the series' axes, without those of pages for one."""
    leading = series.axes.removesuffix(series.keyframe.axes)
    lengths = series.shape[: len(leading)]
    if page is None or not lengths:
        values: Image = series.asarray()
        return values
    places = [i for i, axis in enumerate(leading) if axis not in "SC"]
    index: list[Any] = [slice(None)] * len(leading)
    for place, position in zip(places, np.unravel_index(page, [lengths[i] for i in places]), strict=True):
        index[place] = int(position)
    if len(series.pages) != math.prod(lengths):  # some programs write one page and say that more follow
        return np.asarray(series.asarray()[tuple(index)])
    numbers = np.arange(len(series.pages)).reshape(lengths)[tuple(index)]
    pages = np.stack([series.pages[int(number)].asarray() for number in numbers.ravel()])
    return pages.reshape(*numbers.shape, *pages.shape[1:])


def _in_order(values: Image, axes: list[str], page: Any) -> tuple[Image, list[str]]:
    """(*size, channels) upright, and what was decided: white is 0, palettes are colours, opacity is laid on white."""
    notes: list[str] = []
    colour = [axes.index(axis) for axis in "CS" if axis in axes]
    values = np.moveaxis(values, colour, range(-len(colour), 0)) if colour else values[..., None]
    samples = values.shape[-1] if "S" in axes else 1
    if page.photometric == _PALETTE and page.colormap is not None:
        values = np.moveaxis((page.colormap[:, values[..., 0]] // 256).astype(np.uint8), 0, -1)
    elif page.photometric == _WHITE_IS_ZERO and values.dtype.kind == "u":
        values = (2**page.bitspersample - 1 - values).astype(values.dtype)
    opacity = [i for i, kind in enumerate(page.extrasamples) if kind in (_PREMULTIPLIED, _ALPHA)]
    if opacity:
        place = samples - len(page.extrasamples) + opacity[0]
        premultiplied = page.extrasamples[opacity[0]] == _PREMULTIPLIED
        values = formats.on_white(np.delete(values, place, axis=-1), values[..., place], premultiplied=premultiplied)
        notes.append(formats.ON_WHITE)
    if len(colour) > 1:
        values = values.reshape(*values.shape[:-2], -1)
    orientation = page.tags.get(_ORIENTATION)
    turn = 1 if orientation is None else orientation.value
    return (formats.upright(values, turn) if values.ndim == 3 and turn in range(1, 9) else values), notes
