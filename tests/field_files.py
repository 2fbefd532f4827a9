"""Makes scenes, slices, volumes, recordings and clips with the libraries of their fields, or skips the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


def scene(path: Path, values: np.ndarray, descriptions: list[str] | None = None, **profile: Any) -> Path:
    """A GeoTIFF of (bands, height, width) with pixels of 10 m."""
    rasterio = pytest.importorskip("rasterio")
    count, height, width = values.shape
    grid = rasterio.Affine(10, 0, 5e5, 0, -10, 4e6)
    size = {"count": count, "height": height, "width": width, "dtype": values.dtype}
    with rasterio.open(path, "w", driver="GTiff", crs="EPSG:32633", transform=grid, **size, **profile) as file:
        file.write(values)
        file.descriptions = descriptions or [None] * count
    return path


def slice_file(path: Path, values: np.ndarray, **elements: Any) -> Path:
    """A DICOM file of (rows, columns) or (frames, rows, columns) unsigned integers; `elements` by keyword."""
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
    data.Rows, data.Columns = values.shape[-2:]
    data.SamplesPerPixel, data.PixelRepresentation, data.PhotometricInterpretation = 1, 0, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * values.dtype.itemsize
    data.PixelSpacing, data.SliceThickness = [0.5, 0.25], 1
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    data.HighBit = data.BitsStored - 1
    data.PixelData = values.tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


def volume(path: Path, values: np.ndarray, axes: str = "RAS", slope: float = 1, intercept: float = 0) -> Path:
    """A NIfTI volume whose axes run in the directions that the letters name, with voxels of 1 x 2 x 3 mm."""
    nibabel = pytest.importorskip("nibabel")
    turn = nibabel.orientations.axcodes2ornt(axes)
    affine = np.diag([1.0, 2, 3, 1]) @ nibabel.orientations.inv_ornt_aff(turn, values.shape[:3])
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_slope_inter(slope, intercept)
    nibabel.save(image, path)
    return path


def sound(path: Path, values: np.ndarray, rate: int = 16000) -> Path:
    """A recording of (samples, channels), from -1 to 1."""
    pytest.importorskip("soundfile").write(path, values, rate)
    return path


def clip(path: Path, frames: int, codec: str) -> Path:
    """A video of 64 x 48 pixels, 25 frames a second, with a key frame every 12 frames."""
    av = pytest.importorskip("av")
    rows, columns = np.mgrid[:48, :64]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = 12
        for number in range(frames):
            pixels = np.stack([rows * 5 + number, columns * 3 + 2 * number, rows + columns], axis=-1) % 256
            frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
