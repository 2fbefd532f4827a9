"""Scenes: GeoTIFF and JPEG 2000 by rasterio, in windows."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from torchmae.data.formats import ON_WHITE, on_white
from torchmae.data.items import Context, FileItem, Image, Region
from torchmae.errors import DataError, require

# GDAL reads no file but the one that is opened: none beside it, such as x.tif.aux.xml or x.tfw.
_ALONE = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_PAM_ENABLED": "NO", "GDAL_GEOREF_SOURCES": "INTERNAL"}


class SceneItem(FileItem):
    """A scene, (height, width) with its bands; `meta` keeps no-data, coordinate system and transformation."""

    def __init__(self, file: bytes | Path, context: Context, driver: str) -> None:
        logging.getLogger("rasterio").addHandler(logging.NullHandler())  # what GDAL says is raised as well
        self._file, self._driver = file, driver
        scene, _ = self._handle()
        names = [interpretation.name for interpretation in scene.colorinterp]
        self._opacity = names.index("alpha") if "alpha" in names else None
        bands = [i for i in range(scene.count) if i != self._opacity]
        self._indexes = [i + 1 for i in bands]
        notes = [] if self._opacity is None else [ON_WHITE]
        if any("PER_DATASET" in {flag.name.upper() for flag in flags} for flags in scene.mask_flag_enums) and not notes:
            notes.append("the mask in the file not used")
        if any(scene.scales[i] != 1 or scene.offsets[i] != 0 for i in bands):
            notes.append("scale and offset of the bands not applied")
        matrix = scene.transform
        meta: dict[str, Any] = {
            "crs": scene.crs.to_string() if scene.crs else None,
            "transform": tuple(matrix)[:6],
            "spacing": (math.hypot(matrix.b, matrix.e), math.hypot(matrix.a, matrix.d)),
        }
        if (nodata := scene.nodata) is not None:
            meta["nodata"] = "nan" if math.isnan(nodata) else nodata
        descriptions = tuple(scene.descriptions[i] or "" for i in bands)
        super().__init__(
            scene.shape,
            len(bands),
            scene.dtypes[0],
            context,
            form="GeoTIFF" if driver == "GTiff" else "JPEG 2000",
            bands=descriptions if all(descriptions) else (),
            notes=tuple(notes),
            meta=meta,
        )

    def _open(self) -> Any:
        """The opened data set, and what keeps its memory."""
        rasterio = require("rasterio", "geo")
        with rasterio.Env(**_ALONE):
            if isinstance(self._file, Path):
                return rasterio.open(os.path.abspath(self._file), driver=self._driver), None  # noqa: PTH100
            memory = rasterio.MemoryFile(self._file)
            return memory.open(driver=self._driver), memory

    def _take(self, region: Region) -> Image:
        (top, height), (left, width) = region
        scene, _ = self._handle()
        window = ((top, top + height), (left, left + width))
        try:
            values = np.moveaxis(scene.read(self._indexes, window=window), 0, -1)
            if self._opacity is not None:
                values = on_white(values, scene.read(self._opacity + 1, window=window))
        except require("rasterio.errors", "geo").RasterioIOError as error:
            raise DataError(f"damaged, or cut short: {error.__cause__ or error}") from None
        return values


def open_jp2(file: bytes | Path, context: Context) -> SceneItem:
    """A JPEG 2000 file, such as a band of Sentinel-2."""
    return SceneItem(file, context, "JP2OpenJPEG")
