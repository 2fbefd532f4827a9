"""Many short strings in two arrays: a million file names as 30 MB, not as a million objects."""

from __future__ import annotations

import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt


class Strings:
    """A sequence of byte strings: their bytes end to end, and where each one ends.

    A list of strings would take 100 bytes an entry, and be copied into every worker process entry by entry as the
    reference counts that live beside them change.

    Args:
        content: the bytes of all strings, one after the other.
        ends: (N,) int64, the end of each within `content`, rising.
    """

    def __init__(self, content: bytes | bytearray, ends: npt.NDArray[np.int64]) -> None:
        self._content = content
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        start = self._ends[index - 1] if index else 0
        return bytes(self._content[start : self._ends[index]])

    def __iter__(self) -> Iterator[bytes]:
        return (self[i] for i in range(len(self)))

    @property
    def parts(self) -> tuple[bytes | bytearray, npt.NDArray[np.int64]]:
        """What `Strings` are made of: content and ends."""
        return self._content, self._ends

    def between(self, start: int, stop: int) -> Strings:
        """The strings from `start` up to `stop`."""
        first = int(self._ends[start - 1]) if start else 0
        last = int(self._ends[stop - 1]) if stop else 0
        return Strings(self._content[first:last], self._ends[start:stop] - first)


class StringsWriter:
    """Collects strings one by one."""

    def __init__(self) -> None:
        self._content = bytearray()
        self._ends = array.array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, value: bytes) -> None:
        """Puts a string at the end."""
        self._content += value
        self._ends.append(len(self._content))

    def finish(self) -> Strings:
        """The strings so far, not copied; nothing can be added after it."""
        return Strings(self._content, np.frombuffer(self._ends, dtype=np.int64))


def pack_strings(values: Iterable[bytes]) -> Strings:
    """`values` as `Strings`."""
    writer = StringsWriter()
    for value in values:
        writer.add(value)
    return writer.finish()


def join_strings(parts: Sequence[Strings]) -> Strings:
    """Several sequences, one after the other."""
    if len(parts) == 1:
        return parts[0]
    contents, ends = zip(*((part._content, part._ends) for part in parts), strict=True)
    starts = np.cumsum([0] + [len(content) for content in contents[:-1]])
    return Strings(b"".join(contents), np.concatenate([own + start for own, start in zip(ends, starts, strict=True)]))
