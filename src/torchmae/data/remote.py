"""Files at URLs (http, s3, gs, whatever fsspec knows), read by ranges through a bounded cache of blocks on disk."""

from __future__ import annotations

import importlib
import io
import os
import re
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from torchmae.data.cache import cache_folder, trim_sometimes
from torchmae.data.sources import digest
from torchmae.errors import ConfigError, DataError

Place = Path | str
"""A local path, or a URL."""

BLOCK = 64 * 2**10
"""Bytes that are fetched and kept together: about a photograph of 224 pixels."""

ATTEMPTS = 6
"""Times that a request is made before it counts as failed: with the waits in between, 31 times `FIRST_WAIT_S`."""

FIRST_WAIT_S = 0.5
"""Seconds before the second attempt; doubled before each further one."""

_READ_BUFFER = 4 * 2**20
_BRACES = re.compile(r"\{([^{}]*)\}")
_MAX_EXPANDED = 1_000_000
# What file systems say a file's version is, by whatever name.
_VERSION_KEYS = ("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "generation", "Last-Modified", "LastModified")


def is_url(spec: str) -> bool:
    """Whether a data source is named by a URL."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", spec) is not None


def last_name(place: Place) -> str:
    """The file name at the end of a path or URL; what follows a "?" (it may be a secret) is left out."""
    return place.name if isinstance(place, Path) else shown(place).rstrip("/").rpartition("/")[2]


def shown(url: str) -> str:
    """A URL as it may be printed: without a query and without a password."""
    return re.sub(r"(://)[^/@]*@", r"\1", _split_query(url)[0])


def beside(place: Place, name: str) -> Place:
    """The place of another file in the same folder."""
    if isinstance(place, Path):
        return place.with_name(name)
    path, query = _split_query(place)
    return f"{path.rpartition('/')[0]}/{name}{query}"


def _split_query(url: str) -> tuple[str, str]:
    """A URL and its query, with the "?" before it. In buckets, "?" without "=" behind it stands for any character."""
    path, question, query = url.partition("?")
    is_query = re.match("https?:", url, re.IGNORECASE) or "=" in query
    return (path, question + query) if is_query else (url, "")


def expand_braces(pattern: str) -> list[str]:
    """`a-{000..002}.tar` and `{a,b}.tar` as the names they stand for, in the order written.

    Raises:
        ConfigError: more than a million names.
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    between = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if between:
        first, last = int(between[1]), int(between[2])
        if abs(last - first) >= _MAX_EXPANDED:
            raise ConfigError(f"{pattern} stands for more than {_MAX_EXPANDED:,} files", "name fewer, larger ones")
        width = len(between[1]) if between[1].startswith("0") else 0
        step = 1 if last >= first else -1
        choices = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    else:
        choices = match[1].split(",")
    head, tail = pattern[: match.start()], expand_braces(pattern[match.end() :])
    if len(choices) * len(tail) > _MAX_EXPANDED:
        raise ConfigError(f"{pattern} stands for more than {_MAX_EXPANDED:,} files", "name fewer, larger ones")
    return [f"{head}{choice}{rest}" for choice in choices for rest in tail]


def expand_url(pattern: str) -> list[str]:
    """The URLs that a URL with braces and, where the file system can list, with *, ? and [...] stands for.

    At http(s), "?" begins the query, which is kept as it is.

    Raises:
        DataError: none matches.
    """
    urls: list[str] = []
    for url in expand_braces(pattern):
        if not any(character in _split_query(url)[0] for character in "*?["):
            urls.append(url)
            continue
        system, path = file_system(url)
        try:
            found = sorted(system.glob(path))
        except Exception as error:  # each file system fails in its own way
            raise DataError(f"cannot list {shown(url)}: {_reason(error)}", "name the files: {000..099}") from error
        urls += [system.unstrip_protocol(name) for name in found]
    if not urls:
        raise DataError(f"nothing matches {shown(pattern)}", "check data.source")
    return urls


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises:
        ConfigError: a protocol that fsspec does not know, or whose library is not installed.
    """
    core = importlib.import_module("fsspec.core")
    try:
        system, path = core.url_to_fs(url)
    except ImportError as error:
        raise ConfigError(f"{shown(url)}: {_reason(error)}", "pip install 'torchmae[remote]'") from error
    except ValueError as error:
        raise ConfigError(f"{shown(url)}: {_reason(error)}", "give a URL such as https://, s3:// or gs://") from error
    return system, path


def place_version(place: Place) -> tuple[int, str]:
    """The size of a file, and a text that changes when it does.

    Raises:
        DataError: it is not there, or does not say how large it is.
    """
    if isinstance(place, Path):
        try:
            status = place.stat()
        except OSError as error:
            raise DataError(f"cannot read {place}: {error.strerror}") from error
        return status.st_size, str(status.st_mtime_ns)
    system, path = file_system(place)
    info = attempt(lambda: system.info(path), time.sleep, place)
    if not isinstance(info.get("size"), int):
        raise DataError(f"{shown(place)} does not say how large it is", "serve it with a Content-Length")
    return info["size"], digest(info.get(key, "") for key in (*_VERSION_KEYS, "mtime"))


def attempt(request: Callable[[], Any], wait: Callable[[float], object], url: str) -> Any:
    """Makes a request, several times if need be, with longer and longer waits in between.

    Args:
        request: what to do.
        wait: called with seconds.
        url: what it is about, for the message.

    Raises:
        DataError: the file does not exist or may not be read; or every attempt failed.
    """
    number = 0
    while True:
        number += 1
        try:
            return request()
        except (FileNotFoundError, PermissionError) as error:
            kind = "does not exist" if isinstance(error, FileNotFoundError) else "may not be read"
            raise DataError(f"{shown(url)} {kind}", "check the address and its credentials") from error
        except Exception as error:  # aiohttp, botocore, google: each has errors of its own
            if number == ATTEMPTS:
                raise DataError(
                    f"{shown(url)} cannot be fetched after {ATTEMPTS} attempts: {_reason(error)}", "check the network"
                ) from error
        wait(FIRST_WAIT_S * 2 ** (number - 1))


class RemoteBytes:
    """A file at a URL, by ranges.

    What was fetched is kept in the cache folder, in a sparse file with a checksum for each block, so that any number
    of processes may share it and a crash, an eviction or a damaged disk cost a second fetch and nothing else.

    Args:
        url: where it is.
        size: bytes in it.
        version: changes when the file does (`place_version`).
        wait: called with seconds between attempts.
    """

    def __init__(self, url: str, size: int, version: str, wait: Callable[[float], object] = time.sleep) -> None:
        self.url = url
        self.size = size
        self._key = digest([url, size, version])
        self._wait = wait

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop - 1`, from the cache where they are there.

        Raises:
            DataError: they cannot be had.
        """
        assert 0 <= start <= stop <= self.size
        if start == stop:
            return b""
        first, last = start // BLOCK, (stop - 1) // BLOCK
        blocks = self._cached(first, last)
        missing = [i for i, block in enumerate(blocks) if block is None]
        for run in np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1) if missing else []:
            fetched = self._fetch(first + int(run[0]), first + int(run[-1]))
            for offset, i in enumerate(run.tolist()):
                blocks[i] = fetched[offset * BLOCK : (offset + 1) * BLOCK]
        content = b"".join(block for block in blocks if block is not None)
        return content[start - first * BLOCK : stop - first * BLOCK]

    def _fetch(self, first: int, last: int) -> bytes:
        """Blocks `first` to `last` from the network, and into the cache."""
        start, stop = first * BLOCK, min((last + 1) * BLOCK, self.size)
        system, path = file_system(self.url)

        def request() -> bytes:
            content: bytes = system.cat_file(path, start=start, end=stop)
            if len(content) != stop - start:
                ranges = "; does the server support ranges?" if len(content) > stop - start else ""
                raise OSError(f"{len(content)} bytes came in place of {stop - start}{ranges}")
            return content

        content: bytes = attempt(request, self._wait, self.url)
        with suppress(OSError):  # a full disk: go without
            self._keep(first, content)
        return content

    def _files(self) -> tuple[Path, Path]:
        stem = remote_folder() / self._key
        return stem.with_suffix(".data"), stem.with_suffix(".sums")

    def _cached(self, first: int, last: int) -> list[bytes | None]:
        """Blocks that are in the cache and whole."""
        data, sums = self._files()
        count = last - first + 1
        try:
            with sums.open("rb") as file:
                file.seek(4 * first)
                known = np.frombuffer(file.read(4 * count), dtype="<u4")
            with data.open("rb") as file:
                file.seek(first * BLOCK)
                content = file.read(count * BLOCK)
        except OSError:
            return [None] * count
        found: list[bytes | None] = [content[i * BLOCK : (i + 1) * BLOCK] for i in range(count)]
        return [
            block if block and i < len(known) and known[i] == _checksum(block) else None
            for i, block in enumerate(found)
        ]

    def _keep(self, first: int, content: bytes) -> None:
        data, sums = self._files()
        data.parent.mkdir(parents=True, exist_ok=True)
        blocks = [content[i : i + BLOCK] for i in range(0, len(content), BLOCK)]
        _write_at(data, first * BLOCK, content)
        _write_at(sums, 4 * first, np.array([_checksum(block) for block in blocks], dtype="<u4").tobytes())
        trim_sometimes()


def remote_folder() -> Path:
    """Where parts of remote files are kept."""
    return cache_folder() / "remote"


def open_place(place: Place) -> IO[bytes]:
    """Opens a file for reading, wherever it is; a remote one through the cache.

    Raises:
        DataError: a remote file that is not there.
        OSError: a local one.
    """
    if isinstance(place, Path):
        return place.open("rb")
    return io.BufferedReader(_RemoteFile(RemoteBytes(place, *place_version(place))), _READ_BUFFER)


class _RemoteFile(io.RawIOBase):
    """The file interface of `RemoteBytes`."""

    def __init__(self, content: RemoteBytes) -> None:
        self._content = content
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._content.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        start = min(self._position, self._content.size)
        content = self._content.read(start, min(start + len(buffer), self._content.size))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def _write_at(path: Path, offset: int, content: bytes) -> None:
    """Writes into a file that other processes may write to elsewhere; what lies before `offset` may be a hole."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.seek(offset)
        file.write(content)


def _checksum(block: bytes) -> int:
    return zlib.crc32(block) or 1  # 0 stands for a block that is not there


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
