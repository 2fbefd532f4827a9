"""TIFF files: by tifffile and imagecodecs; one page of 8 bits, grey or RGB, by Pillow."""

from __future__ import annotations

import io
import logging
import math
import weakref
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from torchmae.data import formats
from torchmae.data.geo import SceneItem
from torchmae.data.items import CUT_SHORT, Context, FileItem, Image, Item, Region, Side, check_values
from torchmae.errors import ConfigError, DataError, require

# Tags (TIFF 6.0), GDAL's, and what their values mean.
_WIDTH, _LENGTH = 256, 257
_KIND, _BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _EXTRA_SAMPLES, _FORMAT = 254, 258, 262, 274, 277, 338, 339
_NODATA = 42113
_GEOREFERENCE = {33550, 34264, 34735}  # of GeoTIFF: size of a pixel, transformation, coordinate system
_REDUCED, _IS_MASK = 1, 4  # bits of _KIND
_WHITE_IS_ZERO, _PALETTE, _CMYK = 0, 3, 5
_PREMULTIPLIED, _ALPHA = 1, 2
_NAMES = {1: "uint", 2: "int", 3: "float"}
_TAG_BYTES = {False: 12, True: 20}  # of a tag in a TIFF file, and in a BigTIFF file
_MAX_PAGES = 100_000
_LARGE = 2**22  # pixels of a picture from which on it is not Pillow's, which decodes all of it


def open_tiff(file: bytes | Path, context: Context) -> Item:
    """A TIFF file: a page, or all as a stack, as `context` says, without previews; DataError: damaged, too large.

    A file with one page that is georeferenced is a scene where rasterio is installed (`geo`).
    """
    with formats.opened(file) as stream:
        is_plain, is_large, text, is_cut, is_scene = _read_head(stream)
    if is_scene and find_spec("rasterio"):
        return SceneItem(file, context, "GTiff")
    if is_cut and context.pages != "first":
        raise DataError(f"{CUT_SHORT}: the file ends before its pages do", "--data.pages first")
    if is_plain and not (is_large and find_spec("tifffile") and find_spec("imagecodecs")):
        data = formats.read_file(file) if isinstance(file, Path) else file
        picture = formats.open_pillow(data, "TIFF")
        tags = getattr(picture, "tag_v2", {})
        # Values that Pillow converts are not those that the tag names.
        nodata = _nodata(tags.get(_NODATA)) if picture.mode in ("L", "RGB") and tags.get(_PHOTOMETRIC) in (1, 2) else {}
        item = formats.loaded_item(picture, replace(context, num_channels=None) if nodata else context)
        item.meta |= nodata
        return item
    try:
        require("tifffile", "tiff"), require("imagecodecs", "tiff")
    except ConfigError as error:
        raise DataError(f"a TIFF file of {text} needs tifffile and imagecodecs", error.fix) from None
    return PagesItem(file, context)


class _Head(NamedTuple):
    """What the tags of a file say."""

    is_plain: bool  # Pillow reads all of it
    is_large: bool  # parts of it are worth reading without the rest
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
    large = tags.get(_WIDTH, 1) * tags.get(_LENGTH, 1) > _LARGE
    return _Head(plain, large, text, at.next >= size, is_scene)


class PagesItem(FileItem):
    """A page of a TIFF file, or all as a stack; a region is read from the strips or tiles that hold it."""

    def __init__(self, file: bytes | Path, context: Context) -> None:
        self._file = file
        logging.getLogger("tifffile").addHandler(logging.NullHandler())  # its remarks on odd metadata help nobody here
        every, found = self._handle()
        if not every:
            raise DataError("the file holds no page")
        counts = [math.prod(length for axis, length in _axes(series) if axis not in "YXSC") for series in every]
        notes = ["reduced copies passed over"] if len(found) > len(every) else []
        if context.pages == "stack":
            if len(every) > 1:
                raise DataError(f"its {sum(counts)} pages differ in size or type and are no stack", "--data.pages all")
            self._which, self._page = 0, None
        else:
            self._which = int(np.searchsorted(np.cumsum(counts), context.page, side="right"))
            self._page = context.page - sum(counts[: self._which])
            if sum(counts) > 1 and context.pages == "first":
                notes.insert(0, f"page 1 of {sum(counts)}")
        series = every[self._which]
        self._letters = [axis for axis in series.axes if self._page is None or axis in "YXSC"]
        size = [length for axis, length in _axes(series) if axis in self._letters and axis not in "SC"]
        if len(size) > 3:
            fix = "--data.pages first or all"
            raise DataError(f"its axes are {series.axes}, more than three of space and time", fix)
        samples = math.prod(length for axis, length in _axes(series) if axis in "SC")
        frame = series.keyframe
        check_values(_piece(frame), samples, series.dtype, context)
        if max(map(sum, zip(frame.dataoffsets, frame.databytecounts, strict=True)), default=0) > self._bytes():
            raise DataError(f"{CUT_SHORT}: the file ends before its pixels do")
        one = [length if axis in "SC" else 1 for axis, length in _axes(series) if axis in self._letters]
        like, decided = _in_order(np.zeros(one, series.dtype), self._letters, frame)
        tag = frame.tags.get(_ORIENTATION)
        self._turn = tag.value if tag is not None and tag.value in range(1, 9) and len(size) == 2 else 1
        meta: dict[str, Any] = {"pages": sum(counts)}
        meta |= _nodata(getattr(frame.tags.get(_NODATA), "value", None))
        sides = size[::-1] if self._turn >= 5 else size
        super().__init__(sides, like.shape[-1], like.dtype, context, form="TIFF", notes=(*notes, *decided), meta=meta)

    def _open(self) -> Any:
        """The series of pages without reduced copies, and with them."""
        stream = formats.opened(self._file)
        weakref.finalize(self, stream.close)
        found = require("tifffile", "tiff").TiffFile(stream).series
        return [series for series in found if not series.keyframe.is_reduced], found

    def _bytes(self) -> int:
        return self._file.stat().st_size if isinstance(self._file, Path) else len(self._file)

    def _take(self, region: Region) -> Image:
        series = self._handle()[0][self._which]
        whole = tuple((0, length) for axis, length in _axes(series) if axis in self._letters and axis not in "SC")
        part = region if self._turn == 1 else whole
        values, _ = _in_order(self._values(series, part), self._letters, series.keyframe)
        if self._turn == 1:
            return values
        return formats.upright(values, self._turn)[tuple(slice(start, start + length) for start, length in region)]

    def _values(self, series: Any, region: Region) -> Image:
        """The values of a region of one page, or of all; in the order of the series' axes, without pages' for one."""
        leading = series.axes.removesuffix(series.keyframe.axes)
        lengths = series.shape[: len(leading)]
        parts = dict(zip((axis for axis in self._letters if axis not in "SC"), region, strict=True))
        index: list[Any] = [slice(None)] * len(leading)
        places = [i for i, axis in enumerate(leading) if axis not in "SC"]
        if self._page is None:
            for i in places:
                index[i] = slice(parts[leading[i]][0], sum(parts[leading[i]]))
        elif places:
            for i, position in zip(places, np.unravel_index(self._page, [lengths[i] for i in places]), strict=True):
                index[i] = int(position)
        if len(series.pages) != math.prod(lengths) or series.keyframe.axes not in ("YX", "YXS", "SYX"):
            check_values(series.shape, 1, series.dtype, self._context)
            own = (parts.get(axis) for axis in series.keyframe.axes)
            within = [slice(None) if part is None else slice(part[0], sum(part)) for part in own]
            return np.asarray(series.asarray()[(*index, *within)])  # some programs say that more pages follow
        numbers = np.arange(len(series.pages)).reshape(lengths)[tuple(index)]
        pages = np.stack([_part(series.pages[int(number)], parts["Y"], parts["X"]) for number in numbers.ravel()])
        return pages.reshape(*numbers.shape, *pages.shape[1:])


def _nodata(text: object) -> dict[str, Any]:
    """The entry "nodata" of `Item.meta`, from the text of GDAL's tag; {} if there is no tag or it is no number."""
    try:
        value = float(str(text).strip("\0 "))
    except ValueError:
        return {}
    return {"nodata": "nan" if math.isnan(value) else value}


def _piece(frame: Any) -> tuple[int, int]:
    """Height and width of the strips or tiles of a page."""
    if frame.is_tiled:
        return frame.tilelength, frame.tilewidth
    return min(frame.rowsperstrip, frame.imagelength), frame.imagewidth


def _part(page: Any, rows: Side, columns: Side) -> Image:
    """The values of some rows and columns of a page, in the order of its axes."""
    frame = page.keyframe
    sides, is_planar = _piece(frame), frame.axes[0] == "S"
    grid = [-(-length // side) for length, side in zip((frame.imagelength, frame.imagewidth), sides, strict=True)]
    planes = frame.samplesperpixel if is_planar else 1
    shape = (planes, rows[1], columns[1], 1 if is_planar else frame.samplesperpixel)
    values = np.full(shape, frame.nodata, frame.dtype)
    pairs = zip((rows, columns), sides, strict=True)
    wanted = [range(start // side, -(-(start + length) // side)) for (start, length), side in pairs]
    for plane, down, across in product(range(planes), *wanted):
        number = (plane * grid[0] + down) * grid[1] + across
        if number >= len(page.dataoffsets) or not page.databytecounts[number]:
            continue  # left out by the program that wrote the file
        page.parent.filehandle.seek(page.dataoffsets[number])
        stored = page.parent.filehandle.read(page.databytecounts[number])
        piece, (_, _, top, left, _), _ = frame.decode(
            stored, number, jpegtables=frame.jpegtables, jpegheader=frame.jpegheader
        )
        to, of = [], []
        for first, have, (start, length) in zip((top, left), piece.shape[1:3], (rows, columns), strict=True):
            low, high = max(first, start), min(first + have, start + length)
            to.append(slice(low - start, high - start))
            of.append(slice(low - first, high - first))
        values[plane][tuple(to)] = piece[0][tuple(of)]
    return values[..., 0] if is_planar else values[0] if frame.axes == "YXS" else values[0, ..., 0]


def _axes(series: Any) -> list[tuple[str, int]]:
    """The letter and the length of each axis."""
    return list(zip(series.axes, series.shape, strict=True))


def _in_order(values: Image, axes: list[str], page: Any) -> tuple[Image, list[str]]:
    """(*size, channels), and what was decided: white is 0, palettes are colours, opacity is laid on white."""
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
    return values, notes
