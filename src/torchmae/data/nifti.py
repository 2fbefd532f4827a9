"""NIfTI volumes, with or without gzip, by nibabel."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from torchmae.data.formats import MAX_HEADER, opened
from torchmae.data.items import CUT_SHORT, Context, FileItem, Image, Region, check_values
from torchmae.errors import DataError, require


class VolumeItem(FileItem):
    """A volume whose axes run to the right, to the front and up (RAS, as nibabel's closest canonical image).

    Of a file with a fourth axis, the volume at `context.page`; `pages` "stack" takes all of them for channels. Where
    samples have two axes, an axis of length 1 is left out. `meta` has "spacing", most often in millimetres.
    """

    def __init__(self, file: bytes | Path, context: Context) -> None:
        self._file, self._context = file, context
        with self._image() as image:
            shape = (*image.shape, 1, 1, 1)[: max(3, len(image.shape))]
            volumes, stacked = math.prod(shape[3:]), context.pages == "stack"
            if not stacked and context.page >= volumes:
                raise DataError(f"it has no page {context.page + 1}")
            zooms = (*map(float, image.header.get_zooms()[:3]), 1.0, 1.0)
            order = require("nibabel.orientations", "medical").io_orientation(
                image.affine
            )  # of each axis: its place, and 1 or -1
            if len(order) != 3 or np.isnan(order).any():
                raise DataError("its affine matrix gives no orientation")
            dtype, self._scale = image.get_data_dtype(), (image.dataobj.slope, image.dataobj.inter)
            self._stored = image.dataobj.dtype, int(image.dataobj.offset)
        self._shape, self._page = shape, None if stacked else context.page
        self._axes = np.argsort(order[:, 0]).tolist()  # of the file, in the order in which they are given
        self._backwards = [bool(order[axis, 1] < 0) for axis in self._axes]
        lengths = [shape[axis] for axis in self._axes]
        flat = context.spatial_dims == 2 and 1 in lengths
        self._left_out = lengths.index(1) if flat else None
        kept = [place for place in range(3) if place != self._left_out]
        super().__init__(
            [lengths[place] for place in kept],
            volumes if stacked else 1,
            np.float32 if self._scale != (1, 0) else dtype,
            context,
            form="NIfTI",
            notes=(f"page 1 of {volumes}",) if volumes > 1 and context.pages == "first" else (),
            meta={"pages": volumes, "spacing": tuple(zooms[self._axes[place]] for place in kept)},
        )

    @contextmanager
    def _image(self) -> Iterator[Any]:
        """The opened image, of which nibabel reads what it is asked for."""
        nibabel = require("nibabel", "medical")
        old, new = nibabel.Nifti1Image, nibabel.Nifti2Image
        with opened(self._file) as raw:
            self._is_packed = is_packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream: Any = gzip.GzipFile(fileobj=raw) if is_packed else raw
            try:
                first = stream.read(new.header_class.sizeof_hdr)
                kind = new if first[4:7] == b"n+2" else old
                if kind is old and first[344:347] != b"n+1":
                    raise DataError("it holds no NIfTI volume")
                header = kind.header_class(first[: kind.header_class.sizeof_hdr], check=False)
                if header["vox_offset"] > MAX_HEADER:
                    raise DataError(f"more than {MAX_HEADER // 2**20} MiB stand before its values")
                if is_packed:  # the way to any value leads through all before it
                    shape = header.get_data_shape()
                    check_values(shape[:3], math.prod(shape[3:]), header.get_data_dtype(), self._context)
                stream.seek(0)
                with require("nibabel.imageglobals", "medical").LoggingOutputSuppressor():  # what it mends in headers
                    image = kind.from_file_map(kind.make_file_map({"image": stream}), mmap=False)
                yield image
            except EOFError:
                raise DataError(f"{CUT_SHORT}: the file ends before its values do") from None

    def _take(self, region: Region) -> Image:
        places = [*region]
        if self._left_out is not None:
            places.insert(self._left_out, (0, 1))
        index: list[Any] = [slice(None)] * len(self._shape)
        for (start, length), axis, backwards in zip(places, self._axes, self._backwards, strict=True):
            start = self._shape[axis] - start - length if backwards else start
            index[axis] = slice(start, start + length)
        if self._page is not None:
            index[3:] = [int(i) for i in np.unravel_index(self._page, self._shape[3:], order="F")]
        if isinstance(self._file, Path) and not self._is_packed:  # nibabel reads each row of a part by itself
            try:
                mapped = np.memmap(self._file, self._stored[0], "r", self._stored[1], self._shape, "F")
            except ValueError:
                raise DataError(f"{CUT_SHORT}: the file ends before its values do") from None
            scaled = require("nibabel.volumeutils", "medical").apply_read_scaling
            values = scaled(np.array(mapped[tuple(index)]), *map(np.asarray, self._scale))
        else:
            with self._image() as image:
                values = np.asarray(image.dataobj[tuple(index[: len(image.shape)])])
        lengths = [part.stop - part.start for part in index[:3]]
        values = values.reshape((*lengths, -1)).transpose(*self._axes, 3)
        values = np.flip(values, tuple(place for place in range(3) if self._backwards[place]))
        return values if self._left_out is None else values.squeeze(self._left_out)
