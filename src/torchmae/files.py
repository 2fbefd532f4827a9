"""Files that are written whole or not at all, and locks between processes."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from torchmae.errors import CheckpointError, TorchmaeError

WRITING = ".writing-"
"""What the name of a file begins with until it is whole."""


def replace_file(
    path: Path, content: bytes | Callable[[IO[bytes]], object], error: type[TorchmaeError] = CheckpointError
) -> None:
    """Writes a file whole or not at all: under another name, flushed, renamed. Makes its folder.

    Args:
        path: the file; one that is there is replaced.
        content: the bytes, or a function that puts them into an open file, which it may seek in.
        error: what to raise.

    Raises:
        TorchmaeError: of the kind `error`: the folder cannot be made or written to, or the disk is full; an older file
            of that name is untouched.
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
        if isinstance(failure, FileExistsError):  # a file stands where a folder should be
            reason = os.strerror(errno.ENOTDIR)
        raise error(f"cannot write {path}: {reason}", "free space, or name another folder") from failure


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


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of `lock_file` and removes its file at the end; BlockingIOError where another process has it."""
    lock = lock_file(path)
    try:
        yield
    finally:
        with suppress(OSError):  # not there
            path.unlink()
        if lock is not None:
            lock.close()


def remove_unless_open(files: Iterable[Path]) -> bool:
    """Removes files that belong together, unless a process holds one of them open (`hold_open`); whether it did."""
    files = list(files)
    for path in files:
        with suppress(ImportError, OSError):  # OSError: it is gone, or the disk knows no locks
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
    """Keeps `remove_unless_open` from removing a file as long as an object lives, here or in a forked process.

    Its time becomes now. OSError where it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY)
    weakref.finalize(owner, os.close, descriptor)
    with suppress(OSError):
        os.utime(path)
    with suppress(ImportError, OSError):  # Windows removes no open file; some disks know no locks
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_SH)
