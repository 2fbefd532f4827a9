"""Reads weight files of other libraries as tensors and plain values; the kind is detected by the first bytes.

No code in a file is run. Stand-ins such as `_Array` read NumPy's values, not NumPy's own unpickling; paths become text.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import struct
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from torchmae.errors import CheckpointError, reason_of

_COPY_AGAIN = "copy or download it again"
_NUMBERS = re.compile(r"[biufc?]\d{0,2}$")
_PATHS = ("PurePath", "PurePosixPath", "PureWindowsPath", "Path", "PosixPath", "WindowsPath")
_TEXT = bytes([*b"\t\n\r", *range(32, 127)])
# First bytes (lower case) of files that are no weights: what the file is, and the fix.
_IN_PLACE = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "fetch them: git lfs pull"),
    (b"<!doctype", "a web page", f"{_COPY_AGAIN}; the address may need a login"),
    (b"<html", "a web page", f"{_COPY_AGAIN}; the address may need a login"),
    (b"<?xml", "an XML text, such as a server's error message", f"{_COPY_AGAIN}; the address may need a login"),
    (b"\x1f\x8b", "compressed by gzip", "unpack it: gunzip"),
    (b"\x89hdf", "an HDF5 file", "convert it to .safetensors"),
)


def read_file(path: Path) -> dict[str, Any]:
    """The values in a .safetensors file or a file of torch.save, by name: tensors, plain values, nested containers.

    CheckpointError: another kind of file, a damaged or incomplete one, or one that asks to run code.
    """
    try:
        check_content(path)
        content = load_file(path) if _is_safetensors(path) else _load_pickled(path)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path} is no file of plain tensors" + (f": it asks for {what[1]}" if what else ""),
            "torchmae does not run code from files; save its state_dict alone, best as .safetensors",
        ) from error
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        raise CheckpointError(
            f"cannot read {path}: {reason_of(error)}", "give a .safetensors or .pth file of weights"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}", "give a state_dict, saved by name")
    return content


def check_content(path: Path) -> None:
    """Raises CheckpointError, which says what the file is, for files that are no weights and for partial downloads."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
    if not size:
        raise CheckpointError(f"{path} is empty", _COPY_AGAIN)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, what, fix in _IN_PLACE:
        if text.startswith(start):
            raise CheckpointError(f"{path} is {what}", fix)
    if not head.translate(None, _TEXT):
        shown = " ".join(head[:60].decode("ascii").split())
        raise CheckpointError(f"{path} is text, which begins {shown!r}, and not weights", _COPY_AGAIN)
    if not any(head) and _only_zeros(path):
        raise CheckpointError(f"{path} holds {size:,} bytes that are all zero: its content never arrived", _COPY_AGAIN)
    if _is_safetensors(path) and (stated := _stated_size(path, size)) > size:
        raise CheckpointError(f"{path} is cut short: it has {size:,} bytes of {stated:,} or more", _COPY_AGAIN)
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} is cut short: the end of its archive is missing", _COPY_AGAIN)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if not any(name.endswith("data.pkl") for name in names):
            raise CheckpointError(
                f"{path} is an archive of other files ({', '.join(names[:2])}, ...)", "give the weight file itself"
            )


def _only_zeros(path: Path) -> bool:
    with path.open("rb") as file:
        return all(chunk.count(0) == len(chunk) for chunk in iter(lambda: file.read(1 << 20), b""))


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _stated_size(path: Path, size: int) -> int:
    """The size in bytes that the header of a safetensors file states; 0 data bytes if it cannot be read."""
    with path.open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
        text = file.read(header) if header < size else b""
    end = 0
    with suppress(ValueError, AttributeError, KeyError, TypeError):  # no JSON of tensors: load_file reports it
        end = max(item["data_offsets"][1] for name, item in json.loads(text).items() if name != "__metadata__")
    return int(8 + header + end)


def _load_pickled(path: Path) -> Any:
    stand_ins: list[Any] = [argparse.Namespace]  # the training options in released checkpoints: plain data
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        stand_ins += [(_scalar, f"{module}.scalar"), (_Array, f"{module}._reconstruct")]
    stand_ins += [(_Array, "numpy.ndarray"), (_Dtype, "numpy.dtype")]
    stand_ins += [(_no_bytes, f"{module}.bytes") for module in ("builtins", "__builtin__")]
    stand_ins += [(_path, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name in _PATHS]
    with torch.serialization.safe_globals(stand_ins), path.open("rb") as file:  # torch.load heeds the name of a path
        return torch.load(file, map_location="cpu", weights_only=True)


class _Dtype:
    """Stand-in for numpy.dtype; `code` is the kind and size of a number, None for any other type."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code if isinstance(code, str) and _NUMBERS.match(code) else None
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"

    def read(self, raw: Any, shape: Any, *, columns_first: bool = False) -> Any:
        """The bytes as an array in native byte order; None: they are no numbers."""
        if self.code is None or not isinstance(raw, bytes):
            return None
        dtype = np.dtype(self.order + self.code)
        array = np.frombuffer(raw, dtype) if raw else np.empty(0, dtype)
        array = array.reshape(shape, order="F" if columns_first else "C")
        return np.array(array, dtype.newbyteorder("="), order="C")


class _Array:
    """Stand-in for numpy.ndarray; `value` is the array, None if it holds no numbers."""

    def __init__(self, *_: Any) -> None:
        self.value: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, columns_first, raw = state
        if isinstance(dtype, _Dtype):
            self.value = dtype.read(raw, shape, columns_first=bool(columns_first))


def _scalar(dtype: Any, raw: Any = b"") -> Any:
    """Stand-in for NumPy's scalars: a Python number; None: it is no number."""
    value = dtype.read(raw, ()) if isinstance(dtype, _Dtype) else None
    return None if value is None else value.item()


def _no_bytes(*_: Any) -> bytes:
    """Stand-in for `bytes`, which the pickles of empty arrays call."""
    return b""


def _path(*parts: Any) -> str:
    return "/".join(map(str, parts))


def plain(value: Any) -> Any:
    """A value of `read_file`; NumPy's arrays become tensors, or None if they hold no numbers."""
    if not isinstance(value, _Array):
        return value
    with suppress(TypeError):  # types of numbers that torch does not have
        return None if value.value is None else torch.from_numpy(value.value)
    return None
