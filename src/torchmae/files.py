"""Atomic writing of files, and locks between processes."""

from __future__ import annotations

import errno
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from torchmae.errors import CheckpointError, TorchmaeError

WRITING = ".writing-"
"""The prefix of an unfinished file's name."""
LATE = 90.0
"""Seconds until a shared disk shows every machine what one of them has written."""


def replace_file(
    path: Path, content: bytes | Callable[[IO[bytes]], object], error: type[TorchmaeError] = CheckpointError
) -> None:
    """Writes or replaces a file atomically: under a temporary name, flushed, then renamed. Makes its folder.

    `content` is bytes, or a function that writes to an open, seekable file.

    Raises:
        TorchmaeError: of type `error`: the folder cannot be made or written to, or the disk is full. An existing file
            stays as it was.
    """
    writing = path.with_name(f"{WRITING}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        writing.replace(path)
    except BaseException as failure:
        with suppress(OSError):
            writing.unlink()
        if not isinstance(failure, OSError):
            raise
        reason = failure.strerror or failure
        if isinstance(failure, FileExistsError):  # the parent is a file
            reason = os.strerror(errno.ENOTDIR)
        raise error(f"cannot write {path}: {reason}", "free space, or name another folder") from failure


def seen_late(path: Path) -> bool:
    """Waits for a path that another machine has made, up to LATE seconds; returns whether it is there.

    A shared disk may show it late: NFS keeps what it knows of a folder for up to a minute.
    """
    end = time.monotonic() + LATE
    while not path.exists():
        if time.monotonic() > end:
            return False
        with suppress(OSError):
            next(path.parent.iterdir(), None)  # which makes some clients ask the server again
        time.sleep(0.2)
    return True


def flush(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_file(path: Path) -> BinaryIO | None:
    """Locks a file, which is made if needed, until the returned file is closed or this process ends.

    Returns None if the system or the disk has no locks, or the file cannot be made.

    Raises:
        BlockingIOError: another process holds the lock, on this machine or another one that shares the disk.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        file = path.open("ab")
    except OSError:  # the next write reports the reason
        return None
    try:
        # Not flock: children that outlive a killed process would keep its lock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise BlockingIOError(f"{path} is locked") from error
    except OSError:  # the disk has no locks
        file.close()
        return None
    return file


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of `lock_file` and removes the file at the end; BlockingIOError if another process holds it."""
    lock = lock_file(path)
    try:
        yield
    finally:
        with suppress(OSError):  # no such file
            path.unlink()
        if lock is not None:
            lock.close()


def remove_unless_open(files: Iterable[Path]) -> bool:
    """Removes a group of files, unless a process holds one of them open (`hold_open`); returns whether it did."""
    files = list(files)
    for path in files:
        with suppress(ImportError, OSError):  # OSError: no such file, or the disk has no locks
            import fcntl

            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
    for path in files:
        with suppress(OSError):
            path.unlink()
    return True


def hold_open(path: Path, owner: object) -> None:
    """Keeps `remove_unless_open` from removing a file while `owner` exists, in this process or a forked one.

    The file's modification time becomes now. OSError if it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY)
    weakref.finalize(owner, os.close, descriptor)
    with suppress(OSError):
        os.utime(path)
    with suppress(ImportError, OSError):  # Windows never removes open files; some disks have no locks
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_SH)
