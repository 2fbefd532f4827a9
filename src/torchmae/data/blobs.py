"""Many encoded images as one run of bytes, in memory or in a mapped file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


class Blobs:
    """A sequence of byte strings of which a worker process gets no copy when they lie in a file.

    Args:
        ends: (N,) int64, the end of each string within the content, rising.
        content: the bytes of all strings, one after the other, or a file of them.
    """

    def __init__(self, ends: npt.NDArray[np.int64], content: bytes | Path) -> None:
        self._ends = ends
        self._content = content
        self._mapped: npt.NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        start, stop = (int(self._ends[index - 1]) if index else 0), int(self._ends[index])
        if isinstance(self._content, bytes):
            return self._content[start:stop]
        if start == stop:  # of nothing at all, no file can be mapped
            return b""
        if self._mapped is None:
            self._mapped = np.memmap(self._content, mode="r")
        return self._mapped[start:stop].tobytes()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}
