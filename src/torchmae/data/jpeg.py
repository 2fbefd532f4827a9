"""The libraries that decode JPEG files faster than Pillow, where they are installed.

All of them are libjpeg-turbo and give Pillow's pixels; `benchmarks/decode.py` says how fast each is. Nothing here
raises on a damaged file: None means that Pillow has to look, and say what is wrong.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_MARKER, _START_OF_SCAN, _EXIF_OR_XMP = 0xFF, 0xDA, 0xE1  # of JPEG's segments
_END_OF_IMAGE = b"\xff\xd9"
_NVIMGCODEC = ("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13")  # one library, named for two versions of CUDA
_TAIL = 1024  # bytes at the end of a file, some of which a camera may have written behind the picture

Region = tuple[int, int, int, int]
"""First row, first column, height and width of a part of a picture, in pixels."""


class Header(NamedTuple):
    """A JPEG file that can be decoded here.

    Attributes:
        height: in pixels, as stored.
        width: in pixels, as stored.
        grey: one channel, not three.
    """

    height: int
    width: int
    grey: bool


def read_header(data: bytes) -> Header | None:
    """The header of a JPEG; None: it is none, or nothing but Pillow can decode it."""
    module = _import_simplejpeg()
    if module is None:
        return None
    try:
        height, width, colours, _ = module.decode_jpeg_header(data)
    except ValueError:
        return None
    return Header(height, width, colours == "Gray") if colours in ("Gray", "YCbCr", "RGB") else None


def is_upright(data: bytes) -> bool:
    """Whether a file begins as a JPEG does and has no metadata that may ask for a rotation.

    It takes a hundredth of the time in which Pillow reads what stands before the pixels.
    """
    position = 2 if data.startswith(b"\xff\xd8") else len(data)
    while position + 4 <= len(data) and data[position] == _MARKER and data[position + 1] != _EXIF_OR_XMP:
        if data[position + 1] == _START_OF_SCAN:
            return True
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def read_whole(data: bytes, header: Header, reduction: int) -> npt.NDArray[np.uint8] | None:
    """(height, width, 1 or 3) at 1/reduction of the size, rounded up, as stored; None: Pillow has to."""
    try:
        pixels: npt.NDArray[np.uint8] = _import_simplejpeg().decode_jpeg(
            data,
            "GRAY" if header.grey else "RGB",
            min_height=-(-header.height // reduction),
            min_width=-(-header.width // reduction),
        )
    except ValueError:  # damage, some of which Pillow reads past
        return None
    return pixels


def read_region(data: bytes, region: Region) -> npt.NDArray[np.uint8] | None:
    """(height, width, 3) of a part of a JPEG in colour, as stored; None: it has to be decoded whole.

    So it has without nvImageCodec, and where the file was cut short, which this part of it might not show.
    """
    decoder = _region_decoder(os.getpid())
    if decoder is None or _END_OF_IMAGE not in data[-_TAIL:]:
        return None
    module = _import_nvimgcodec()
    top, left, height, width = region
    box = module.Region(top, left, top + height, left + width)
    try:
        decoded = decoder.decode(module.CodeStream(data).get_sub_code_stream(region=box))
    except (RuntimeError, ValueError):
        return None
    if decoded is None or decoded.shape != (height, width, 3):
        return None
    pixels: npt.NDArray[np.uint8] = np.asarray(decoded)
    return pixels


def jpeg_decoder() -> str:
    """What decodes JPEG files in this installation, with versions: it decides how fast, not what they look like."""
    found = []
    for name in ("pillow" if _import_simplejpeg() is None else "simplejpeg", *_NVIMGCODEC):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


@cache
def _import_simplejpeg() -> Any:
    """The module; None where it is not installed."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


@cache
def _import_nvimgcodec() -> Any:
    """The module; None where it is not installed.

    On import it tells the standard error stream which libraries for GPUs it misses; none of them is wanted here.
    """
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.nvimgcodec") is None:
        return None
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    with _no_standard_error():
        try:
            return importlib.import_module("nvidia.nvimgcodec")
        except ImportError:
            return None


@contextmanager
def _no_standard_error() -> Iterator[None]:
    """Nothing that native code writes to the standard error stream of this process arrives."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@cache
def _region_decoder(process: int) -> Any:  # noqa: ARG001 a process has its own: threads do not survive a fork
    """nvImageCodec's decoder; None where there is none."""
    module = _import_nvimgcodec()
    if module is None:
        return None
    try:
        return module.Decoder(
            device_id=module.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[module.Backend(module.CPU_ONLY)],
            options=":fancy_upsampling=1",  # as the other libraries do it
        )
    except RuntimeError:  # a build that cannot do without a GPU
        return None
