"""JPEG decoders that are faster than Pillow and give the same pixels (all use libjpeg-turbo).

Functions return None if only Pillow can decode a file; Pillow then decodes it or reports the error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

END_OF_IMAGE = b"\xff\xd9"  # the last bytes of a JPEG

_MARKER, _START_OF_SCAN, _EXIF_OR_XMP, _PROGRESSIVE = 0xFF, 0xDA, 0xE1, 0xC2  # of JPEG's segments
_NVIMGCODEC = ("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13")  # packages of one library for two versions of CUDA
_TAIL = 1024  # bytes at the end of a file in which the end mark is searched: cameras write data after the picture


class Header(NamedTuple):
    """The header of a JPEG file that can be decoded here: the stored size, and whether it has one channel."""

    height: int
    width: int
    grey: bool


def read_header(data: bytes) -> Header | None:
    """The header of a JPEG; None: no JPEG, or only Pillow can decode it."""
    module = _import_simplejpeg()
    if module is None:
        return None
    try:
        height, width, colours, _ = module.decode_jpeg_header(data)
    except ValueError:
        return None
    return Header(height, width, colours == "Gray") if colours in ("Gray", "YCbCr", "RGB") else None


def is_upright(data: bytes) -> bool:
    """Whether a file begins like a JPEG and has no metadata that could demand a rotation; fast, without Pillow."""
    return _first_segment(data, (_START_OF_SCAN, _EXIF_OR_XMP)) == _START_OF_SCAN


def is_progressive(data: bytes) -> bool:
    """Whether a JPEG is progressive, so that its decoder needs memory for the whole picture."""
    return _first_segment(data, (_START_OF_SCAN, _PROGRESSIVE)) == _PROGRESSIVE


def is_whole(data: bytes) -> bool:
    """Whether a JPEG has its end mark, which other bytes may follow."""
    return END_OF_IMAGE in data[-_TAIL:]


def _first_segment(data: bytes, wanted: Sequence[int]) -> int | None:
    """The kind of the first segment of a JPEG that is of a wanted kind."""
    position = 2 if data.startswith(b"\xff\xd8") else len(data)
    while position + 4 <= len(data) and data[position] == _MARKER:
        if data[position + 1] in wanted:
            return data[position + 1]
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def read_whole(data: bytes, header: Header, reduction: int) -> npt.NDArray[np.uint8] | None:
    """(height, width, 1 or 3) as stored, at 1/reduction of the size, rounded up; None: only Pillow can decode it."""
    with suppress(ValueError):  # damaged; Pillow can read some of these files
        return _import_simplejpeg().decode_jpeg(
            data,
            "GRAY" if header.grey else "RGB",
            min_height=-(-header.height // reduction),
            min_width=-(-header.width // reduction),
        )
    return None


def read_region(data: bytes, region: tuple[tuple[int, int], ...]) -> npt.NDArray[np.uint8] | None:
    """A region (height, width, 3), as stored, of a JPEG in colour; None: decode the whole picture."""
    decoder = _region_decoder(os.getpid())
    if decoder is None or not is_whole(data):
        return None
    module = _import_nvimgcodec()
    (top, height), (left, width) = region
    box = module.Region(top, left, top + height, left + width)
    try:
        decoded = decoder.decode(module.CodeStream(data).get_sub_code_stream(region=box))
    except (RuntimeError, ValueError):
        return None
    return np.asarray(decoded) if decoded is not None and decoded.shape == (height, width, 3) else None


def jpeg_decoder() -> str:
    """The installed JPEG decoders with their versions; they decide the speed of reading, not the pixels."""
    found = []
    for name in ("pillow" if _import_simplejpeg() is None else "simplejpeg", *_NVIMGCODEC):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


@cache
def _import_simplejpeg() -> Any:
    with suppress(ImportError):
        return import_module("simplejpeg")
    return None


@cache
def _import_nvimgcodec() -> Any:
    if find_spec("nvidia") is None or find_spec("nvidia.nvimgcodec") is None:
        return None
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    # Its native code complains on standard error about GPU libraries, which are not needed here.
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        return import_module("nvidia.nvimgcodec")
    except ImportError:
        return None
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@cache
def _region_decoder(process: int) -> Any:  # noqa: ARG001 one for each process: threads do not survive a fork
    module = _import_nvimgcodec()
    if module is None:
        return None
    try:
        return module.Decoder(
            device_id=module.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[module.Backend(module.CPU_ONLY)],
            options=":fancy_upsampling=1",  # as in the other libraries
        )
    except RuntimeError:  # a build that needs a GPU
        return None
