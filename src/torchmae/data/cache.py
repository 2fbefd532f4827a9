"""The folder for what is made once from data that lies elsewhere: indexes, unpacked tables, parts of remote files."""

from __future__ import annotations

import os
import re
import time
import weakref
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from torchmae.errors import ConfigError
from torchmae.files import WRITING
from torchmae.paths import user_path

_DEFAULT_GIB = 50.0
_FOLDERS = ("remote", "parquet", "index")
_TRIM_EVERY_S = 30.0
_ABANDONED_S = 86400.0  # without a change, a file that is being written was left by a process that is gone


def cache_folder() -> Path:
    """TORCHMAE_CACHE; else torchmae/ in XDG_CACHE_HOME; else ~/.cache/torchmae. Need not exist."""
    if given := os.environ.get("TORCHMAE_CACHE"):
        return user_path(given)
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torchmae"


def cache_limit() -> int:
    """Bytes that the cache folder may take: TORCHMAE_CACHE_GIB, 50 GiB if not set.

    Raises:
        ConfigError: TORCHMAE_CACHE_GIB is no positive number.
    """
    given = os.environ.get("TORCHMAE_CACHE_GIB")
    try:
        gib = float(given) if given else _DEFAULT_GIB
    except ValueError:
        gib = -1.0
    if not 0 < gib < float("inf"):
        raise ConfigError(f"TORCHMAE_CACHE_GIB is {given!r}", "set it to a number of GiB above 0, or unset it")
    return int(gib * 2**30)


def trim(limit: int) -> None:
    """Removes files from the cache folder, the oldest first, until they take `limit` bytes at most.

    The time of a file is that of its last change; `hold_open` counts as one. Files that a process holds open stay.
    """
    groups: dict[Path, list[Path]] = defaultdict(list)  # files of one key, which belong together
    for name in _FOLDERS:
        for path in (cache_folder() / name).glob("*"):
            if match := re.match(rf"(?:{WRITING}\d+-)?([0-9a-f]{{32}}(-[0-9a-f]{{32}})?)\.", path.name):
                groups[path.with_name(match[1])].append(path)
    entries = []
    for files in groups.values():
        with suppress(OSError):  # another process removed one
            states = [(file.stat(), file) for file in files]
            newest = max(state.st_mtime for state, _ in states)
            # Sparse files take less than their size.
            size = sum(getattr(state, "st_blocks", state.st_size // 512) * 512 for state, _ in states)
            being_written = any(file.name.startswith(WRITING) for file in files)
            if not being_written or newest < time.time() - _ABANDONED_S:
                entries.append((newest, size, sorted(files)))
    total = sum(size for _, size, _ in entries)
    for _, size, files in sorted(entries):
        if total <= limit:
            return
        if remove_unless_open(files):
            total -= size


def remove_unless_open(files: Iterable[Path]) -> bool:
    """Removes files that belong together, unless a process holds one of them open (`hold_open`); whether it did."""
    files = list(files)
    if any(map(_is_held_open, files)):
        return False
    for file in files:
        with suppress(OSError):
            file.unlink()
    return True


def trim_sometimes() -> None:
    """`trim` to the limit of the cache, at most once in 30 seconds whatever the number of processes."""
    marker = cache_folder() / ".trimmed"
    with suppress(OSError):
        if marker.exists() and abs(time.time() - marker.stat().st_mtime) < _TRIM_EVERY_S:
            return
        marker.touch()
        trim(cache_limit())


def hold_open(path: Path, owner: object) -> None:
    """Keeps `trim` from removing a file of the cache as long as an object lives, here or in a forked process.

    The file counts as the newest.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY)
    weakref.finalize(owner, os.close, descriptor)
    with suppress(OSError):
        os.utime(path)
    with suppress(ImportError, OSError):  # Windows removes no open file; some disks know no locks
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_SH)


def _is_held_open(path: Path) -> bool:
    with suppress(ImportError, FileNotFoundError):
        import fcntl

        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:  # a disk that knows no locks
                return False
    return False
