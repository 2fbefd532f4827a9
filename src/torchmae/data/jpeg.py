"""Faster JPEG decoders than Pillow, with its pixels (all are libjpeg-turbo); None: Pillow looks, and says why."""

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
_NVIMGCODEC = ("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13")  # one library, named for two versions of CUDA
_TAIL = 1024  # bytes at the end of a file, some of which a camera may have written behind the picture


class Header(NamedTuple):
    """The size as stored, and whether there is one channel, of a JPEG file that can be decoded here."""

    height: int
    width: int
    grey: bool


def read_header(data: bytes) -> Header | None:
    """The header of a JPEG; None: it is none, or only Pillow can decode it."""
    module = _import_simplejpeg()
    if module is None:
        return None
    try:
        height, width, colours, _ = module.decode_jpeg_header(data)
    except ValueError:
        return None
    return Header(height, width, colours == "Gray") if colours in ("Gray", "YCbCr", "RGB") else None


def is_upright(data: bytes) -> bool:
    """Whether a file begins as a JPEG does and has no metadata that may ask for a rotation; fast, without Pillow."""
    return _first_segment(data, (_START_OF_SCAN, _EXIF_OR_XMP)) == _START_OF_SCAN


def is_progressive(data: bytes) -> bool:
    """Whether a JPEG comes in several passes over the picture, for which the decoder holds all of it."""
    return _first_segment(data, (_START_OF_SCAN, _PROGRESSIVE)) == _PROGRESSIVE


def is_whole(data: bytes) -> bool:
    """Whether the mark of the end of a JPEG is there; bytes of a camera may follow it."""
    return END_OF_IMAGE in data[-_TAIL:]


def _first_segment(data: bytes, wanted: Sequence[int]) -> int | None:
    """The first of a JPEG's segments that is of a wanted kind."""
    position = 2 if data.startswith(b"\xff\xd8") else len(data)
    while position + 4 <= len(data) and data[position] == _MARKER:
        if data[position + 1] in wanted:
            return data[position + 1]
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def read_whole(data: bytes, header: Header, reduction: int) -> npt.NDArray[np.uint8] | None:
    """(height, width, 1 or 3) at 1/reduction of the size, rounded up, as stored; None: only Pillow can decode it."""
    with suppress(ValueError):  # damage, some of which Pillow reads past
        pixels: npt.NDArray[np.uint8] = _import_simplejpeg().decode_jpeg(
            data,
            "GRAY" if header.grey else "RGB",
            min_height=-(-header.height // reduction),
            min_width=-(-header.width // reduction),
        )
        return pixels
    return None


def read_region(data: bytes, region: tuple[tuple[int, int], ...]) -> npt.NDArray[np.uint8] | None:
    """(height, width, 3) of a region, as stored, of a JPEG in colour; None: it has to be decoded whole."""
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
    """The installed JPEG decoders, with versions: they decide how fast files are read, not what they look like."""
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
    # Its native code complains on the standard error stream about libraries for GPUs, which are not wanted here.
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
def _region_decoder(process: int) -> Any:  # noqa: ARG001 a process has its own: threads do not survive a fork
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
