"""DICOM: slices, frames and series by pydicom, in physical units."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchmae.data.formats import FORMATS, MAX_BYTES, TOO_LARGE, format_of, opened, regular_file
from torchmae.data.items import (
    CUT_SHORT,
    Context,
    FileItem,
    Image,
    Item,
    Region,
    check_values,
    one_line_errors,
    tracked,
)
from torchmae.data.sources import EncodedSource, FileSource, Source, digest
from torchmae.errors import DataError, require

_DEFLATED = b"1.2.840.10008.1.2.1.99"  # the transfer syntax that packs the header too
_EXPLICIT = b"1.2.840.10008.1.2.1\0\0\0"  # the same, unpacked
_FIRST = 2**16  # bytes that hold the name of the transfer syntax
_LONGEST = 2**20  # bytes of an element of the header that is read
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")  # of files with several frames
_UNEVEN = 0.05  # share of the mean distance of slices by which distances may differ
_COLOURS = ("Red", "Green", "Blue")
# The ends of names of files that are not looked into for a series.
_OTHERS = tuple(suffix for name, form in FORMATS.items() if name != "dicom" for suffix in form.suffixes)
_TAGS = [
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PixelRepresentation"),
    *("BitsAllocated", "BitsStored", "PixelPaddingValue", "PixelPaddingRangeLimit", "PixelSpacing", "SliceThickness"),
    *("SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "ImagerPixelSpacing"),
    *("ImagePositionPatient", "ImageOrientationPatient", "SeriesInstanceUID", "InstanceNumber", *_GROUPS),
    *(f"{colour}PaletteColorLookupTable{part}" for part in ("Data", "Descriptor") for colour in _COLOURS),
]


def read_header(file: bytes | Path) -> Any:
    """What stands before the pixels, of `_TAGS`; DataError: it holds no pixels."""
    with opened(unpacked(file)) as stream:
        header = require("pydicom", "medical").dcmread(
            stream, defer_size=_LONGEST, stop_before_pixels=True, force=True, specific_tags=_TAGS
        )
    if not header.get("Rows") or not header.get("Columns"):
        raise DataError("it holds no pixels")
    return header


def unpacked(file: bytes | Path) -> bytes | Path:
    """The file itself, or the content of a deflated one; DataError: it is damaged, or larger than MAX_BYTES."""
    with opened(file) as stream:
        start = stream.read(_FIRST)
        if _DEFLATED not in start[: (end := 144 + int.from_bytes(start[140:144], "little"))]:
            return file
        stream.seek(end)
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        rest = inflate.decompress(stream.read(MAX_BYTES), MAX_BYTES)
    if inflate.unconsumed_tail:
        raise DataError(f"{TOO_LARGE} once it is unpacked")
    if not inflate.eof:
        raise DataError(f"{CUT_SHORT}: the file ends before its values do")
    return start[:end].replace(_DEFLATED, _EXPLICIT) + rest


def _find(header: Any, keyword: str, frame: int = 0) -> Any:
    """The value of an element of the header, else of the groups that all frames share, else of the frame's own."""
    if (value := header.get(keyword)) is not None:
        return value
    for items in filter(None, map(header.get, _GROUPS)):
        for element in items[min(frame, len(items) - 1)]:
            if element.VR == "SQ" and element.value and (value := element.value[0].get(keyword)) is not None:
                return value
    return None


def _line(header: Any, frame: int) -> tuple[float, float]:
    """Slope and intercept of a frame; in PET each frame has its own."""
    slope, intercept = _find(header, "RescaleSlope", frame), _find(header, "RescaleIntercept", frame)
    return float(1 if slope is None else slope), float(intercept or 0)


class DicomItem(FileItem):
    """A slice, (rows, columns), in the unit of its modality; with three axes all frames, (frames, rows, columns).

    float32 after the modality LUT or rescale, else as stored; MONOCHROME1 inverted, palettes and YBR as RGB. Padding is
    no-data. `meta` has "spacing" in millimetres.
    """

    def __init__(self, file: bytes | Path, context: Context) -> None:
        self._file = file = unpacked(file)
        header = self._header = read_header(file)
        rows, columns, samples = int(header.Rows), int(header.Columns), int(header.get("SamplesPerPixel", 1))
        self._frames = int(header.get("NumberOfFrames") or 1)
        self._photometric = str(header.get("PhotometricInterpretation", "MONOCHROME2")).strip()
        is_palette = self._photometric == "PALETTE COLOR"
        bits, signed = int(header.get("BitsAllocated", 16)), bool(header.get("PixelRepresentation", 0))
        stored = np.dtype(np.float32) if bits > 32 else np.dtype(f"{'i' if signed else 'u'}{max(1, bits // 8)}")
        check_values((rows, columns), samples, stored, context)
        each = header.get(_GROUPS[1]) or ()  # of the frames, whose number is the file's word alone
        self._lines = [_line(header, frame) for frame in range(max(1, len(each)))]
        self._lines = self._lines[:1] if len({*self._lines}) == 1 else self._lines
        self._table = bool(header.get("ModalityLUTSequence"))
        self._stack = context.spatial_dims == 3
        self._page = context.page
        if not self._stack and self._page >= self._frames:
            raise DataError(f"it has no page {self._page + 1}")
        is_plain = samples == 3 or is_palette or (self._lines == [(1, 0)] and not self._table)
        meta: dict[str, Any] = {"pages": 1 if self._stack else self._frames}
        if (padding := header.get("PixelPaddingValue")) is not None and samples == 1 and not is_palette:
            meta["nodata"] = float(self._in_units(np.array(padding).astype(stored)))
        plane = _find(header, "PixelSpacing") or header.get("ImagerPixelSpacing")
        if plane is not None:
            depth = _find(header, "SpacingBetweenSlices") or _find(header, "SliceThickness")
            meta["spacing"] = tuple(map(float, plane))
            meta["thickness"] = None if depth is None else float(depth)
            if self._stack:
                meta["spacing"] = (meta["thickness"] or 1.0, *meta["spacing"])
        several = self._frames > 1 and not self._stack and context.pages == "first"
        super().__init__(
            (self._frames, rows, columns) if self._stack else (rows, columns),
            3 if samples == 3 or is_palette else samples,
            (np.uint8 if is_palette else stored) if is_plain else np.float32,
            context,
            form="DICOM",
            notes=(f"page 1 of {self._frames}",) if several else (),
            meta=meta,
        )

    def _in_units(self, values: Image, frame: int = 0) -> Image:
        """Converts stored values of one channel of a frame to the unit of the modality."""
        if self._photometric == "MONOCHROME1":
            signed, bits = self._header.get("PixelRepresentation", 0), int(self._header.get("BitsStored", 16))
            values = ((-1 if signed else 2**bits - 1) - values.astype(np.int64)).astype(values.dtype)
        if self._table:
            return require("pydicom.pixels", "medical").apply_modality_lut(values, self._header).astype(np.float32)
        if self._lines != [(1, 0)]:
            slope, intercept = self._lines[min(frame, len(self._lines) - 1)]
            return (values.astype(np.float64) * slope + intercept).astype(np.float32)
        return values

    def _take(self, region: Region) -> Image:
        (first, count), *sides = region if self._stack else ((self._page, 1), *region)
        crop = tuple(slice(start, start + length) for start, length in sides)
        wanted = range(first, first + count)
        stored = zip(self._stored(wanted), wanted, strict=True)
        frames = np.stack([self._frame(values, number)[crop].copy() for values, number in stored])
        return frames if self._stack else frames[0]

    def _frame(self, values: Image, number: int) -> Image:
        """(rows, columns, channels) of the frame `number`."""
        if self._photometric == "PALETTE COLOR":
            colours = require("pydicom.pixels", "medical").apply_color_lut(values, self._header)
            return (colours >> 8 if colours.dtype == np.uint16 else colours).astype(np.uint8)
        if values.ndim == 3:
            return values
        padding, end = self._header.get("PixelPaddingValue"), self._header.get("PixelPaddingRangeLimit")
        if padding is not None and end is not None:
            low, high = sorted((int(padding), int(end)))
            values = np.where((values >= low) & (values <= high), np.array(padding).astype(values.dtype), values)
        units = self._in_units(values, number)
        if padding is not None and len(self._lines) > 1:
            units[values == np.array(padding).astype(values.dtype)] = self.meta["nodata"]  # one value for all frames
        return units[..., None]

    def _stored(self, frames: range) -> Iterator[Image]:
        """The values of frames as they are stored, one after the other."""
        pydicom, decode = require("pydicom", "medical"), require("pydicom.pixels", "medical").iter_pixels
        with opened(self._file) as stream:
            if "TransferSyntaxUID" in self._header.file_meta:
                yield from decode(stream, indices=frames)
                return
            whole = pydicom.dcmread(stream, force=True)  # without the part that names the encoding
        implicit, little = whole.original_encoding
        names = (pydicom.uid.ExplicitVRBigEndian, pydicom.uid.ExplicitVRLittleEndian)
        whole.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else names[bool(little)]
        yield from decode(whole, indices=frames)


class SeriesItem(FileItem):
    """The slices of a series as one volume, (slices, rows, columns); `files` are in order."""

    def __init__(self, files: Sequence[Path], context: Context) -> None:
        self._files = files
        first = DicomItem(files[0], context)
        super().__init__(
            (len(files), *first.size[1:]), first.channels, first.dtype, context, form="DICOM", meta=dict(first.meta)
        )
        if "spacing" in self.meta:
            span = _position(read_header(files[-1])) - _position(read_header(files[0]))
            gap = span / (len(files) - 1)
            self.meta["spacing"] = (gap or self.meta["spacing"][0], *self.meta["spacing"][1:])

    def _take(self, region: Region) -> Image:
        (first, count), *sides = region
        slices = [DicomItem(file, self._context) for file in self._files[first : first + count]]
        return np.concatenate([item.read(((0, 1), *sides)) for item in slices])


def open_dicom(content: bytes | Path | tuple[Path, ...], context: Context) -> Item:
    """A file, or the files of a series in order."""
    return SeriesItem(content, context) if isinstance(content, tuple) else DicomItem(content, context)


def _position(header: Any) -> float:
    """Where a slice lies along the normal of its plane, in millimetres; by its number where it does not say."""
    place, along = header.get("ImagePositionPatient"), header.get("ImageOrientationPatient")
    if place is None or along is None:
        return float(header.get("InstanceNumber") or 0)
    along = np.array(along, float)
    return float(np.dot(np.cross(along[:3], along[3:]), np.array(place, float)))


class SeriesSource(EncodedSource):
    """Files of which those of one series are one sample; `groups` are their indices in `source`, in order."""

    def __init__(self, source: FileSource, groups: Sequence[tuple[int, ...]]) -> None:
        first = [group[0] for group in groups]
        labels = None if source.labels is None else source.labels[first]
        super().__init__(len(groups), labels, source.classes, source.context)
        self._source, self._groups = source, groups
        self.groups = None if source.groups is None else source.groups[first]
        self.tags = None if source.tags is None else source.tags[first]
        self.remarks = (*source.remarks, f"{len(source):,} DICOM files are {len(groups):,} volumes")

    def content(self, index: int) -> Path | tuple[Path, ...]:
        files = tuple(self._source.content(i) for i in self._groups[index])
        return files if len(files) > 1 else files[0]

    def encoded(self, index: int) -> bytes:
        return b"" if len(self._groups[index]) > 1 else self._source.encoded(self._groups[index][0])

    def name(self, index: int) -> str:
        return self._source.name(self._groups[index][0])

    def fingerprint(self) -> str:
        return digest([self._source.fingerprint(), *self._groups])

    def stamp(self) -> str:
        return self._source.stamp()


def _series_of(file: Path) -> tuple[tuple[Any, ...], float] | None:
    """What slices of one volume share, and where this slice lies; None: no single slice, or damaged."""
    if file.name.lower().endswith(_OTHERS):
        return None
    try:
        with regular_file(file) as stream:
            form = format_of(stream.read(_FIRST))
        if form is FORMATS["dicom"]:
            with one_line_errors():
                header = read_header(file)
                if int(header.get("NumberOfFrames") or 1) == 1:
                    along = tuple(round(float(x), 2) for x in header.get("ImageOrientationPatient") or ())
                    return (str(header.SeriesInstanceUID), header.Rows, header.Columns, along), _position(header)
    except DataError:  # which says so again when it is read
        pass
    return None


def by_series(source: Source) -> Source:
    """A source whose samples are series of DICOM slices; the source itself where no two files are of one series."""
    if not isinstance(source, FileSource):
        return source
    found: dict[tuple[Any, ...], list[tuple[float, int]]] = defaultdict(list)
    for index in tracked(range(len(source)), source.context.progress, "finding series", len(source)):
        series, place = _series_of(source.content(index)) or ((index,), 0.0)
        found[series].append((place, index))
    if len(found) == len(source):
        return source
    ordered = [sorted(slices) for slices in found.values()]
    gaps = [np.diff([place for place, _ in slices]) for slices in ordered if len(slices) > 1]
    uneven = sum(gap.max() - gap.min() > _UNEVEN * gap.mean() for gap in gaps)
    volumes = SeriesSource(source, [tuple(index for _, index in slices) for slices in ordered])
    volumes.remarks += (f"slices of {uneven:,} volumes are not evenly spaced",) if uneven else ()
    return volumes
