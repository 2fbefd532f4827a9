"""The folder for what is made once from data that lies elsewhere: indexes, unpacked tables, parts of remote files."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, BinaryIO

from torchmae.errors import ConfigError, DataError

_DEFAULT_GIB = 50.0


def cache_folder() -> Path:
    """TORCHMAE_CACHE; else torchmae/ in XDG_CACHE_HOME; else ~/.cache/torchmae. Need not exist."""
    if given := os.environ.get("TORCHMAE_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torchmae"


def cache_limit() -> int:
    """Bytes that parts of remote files may take in the cache folder: TORCHMAE_CACHE_GIB, 50 GiB if not set.

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


def write_whole(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Writes a file whole or not at all: under another name, flushed, renamed. Makes its folder.

    Args:
        path: the file; one that is there is replaced.
        write: puts the content into an open file, which it may seek in.

    Raises:
        DataError: the folder cannot be made or written to, or the disk is full.
    """
    writing = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with writing.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            writing.replace(path)
        except BaseException:
            with suppress(OSError):
                writing.unlink()
            raise
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}", "free space, or name another folder"
        ) from error


def lock_file(path: Path) -> BinaryIO | None:
    """Takes a lock that lasts until the file returned is closed, or until this process ends in whatever way.

    Returns:
        The file, made where it was not there; None where the system or the disk knows no locks, or it cannot be made.

    Raises:
        BlockingIOError: another process has it, here or on another machine that shares the disk.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        file = path.open("ab")
    except OSError:  # whoever writes there next says why it cannot be
        return None
    try:
        # Not flock: children that outlive a killed process would hold its lock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise BlockingIOError(f"{path} is locked") from error
    except OSError:  # a disk that knows no locks
        file.close()
        return None
    return file
