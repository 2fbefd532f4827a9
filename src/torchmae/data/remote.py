"""Files at URLs (http, s3, gs and others of fsspec), read by ranges through the cache folder."""

from __future__ import annotations

import io
import os
import re
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np

from torchmae.data.sources import digest
from torchmae.errors import ConfigError, DataError, reason_of, require
from torchmae.files import WRITING, remove_unless_open
from torchmae.paths import user_path

Place = Path | str  # a local path, or a URL

BLOCK = 64 * 2**10  # bytes that are fetched and cached together: about a photograph of 224 pixels
ATTEMPTS = 6  # of a request
FIRST_WAIT_S = 0.5  # before the second attempt; doubled before each further one
_READ_BUFFER = 4 * 2**20
_MAX_EXPANDED = 1_000_000
# The names that file systems give to the version of a file.
_VERSION_KEYS = ("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "generation", "Last-Modified", "LastModified")
_FOLDERS = ("remote", "parquet", "index")
_TRIM_EVERY_S = 30.0
_ABANDONED_S = 86400.0  # an unfinished file that did not change for this time was left by a dead process


def is_url(spec: str) -> bool:
    """Whether a data source is a URL."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", spec) is not None


def last_name(place: Place) -> str:
    """The file name at the end of a path, or of a URL without its query."""
    return place.name if isinstance(place, Path) else shown(place).rstrip("/").rpartition("/")[2]


def shown(url: str) -> str:
    """A URL for messages: without the query and the password, which may be secret."""
    return re.sub(r"(://)[^/@]*@", r"\1", _split_query(url)[0])


def beside(place: Place, name: str) -> Place:
    """Another file in the same folder."""
    if isinstance(place, Path):
        return place.with_name(name)
    path, query = _split_query(place)
    return f"{path.rpartition('/')[0]}/{name}{query}"


def _split_query(url: str) -> tuple[str, str]:
    """A URL and its query with the "?". In buckets, a "?" without "=" after it is a wildcard and no query."""
    path, question, query = url.partition("?")
    is_query = re.match("https?:", url, re.IGNORECASE) or "=" in query
    return (path, question + query) if is_query else (url, "")


def expand_braces(pattern: str) -> list[str]:
    """The names of a pattern such as `a-{00..12}.tar` or `{a,b}.tar`, in order; ConfigError: more than a million."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    choices: Sequence[str | int] = match[1].split(",")
    width = 0
    if between := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = int(between[1]), int(between[2])
        width = len(between[1]) if between[1].startswith("0") else 0
        choices = range(first, last + 1) if last >= first else range(first, last - 1, -1)
    head, tail = pattern[: match.start()], expand_braces(pattern[match.end() :])
    if len(choices) * len(tail) > _MAX_EXPANDED:
        raise ConfigError(f"{pattern} stands for more than {_MAX_EXPANDED:,} files", "name fewer, larger ones")
    return [f"{head}{str(choice).rjust(width, '0')}{rest}" for choice in choices for rest in tail]


def expand_url(pattern: str) -> list[str]:
    """The URLs of a pattern with braces, or with *, ? and [...] if the system can list; DataError: there are none."""
    urls: list[str] = []
    for url in expand_braces(pattern):
        if not any(character in _split_query(url)[0] for character in "*?["):
            urls.append(url)
            continue
        system, path = _file_system(url)
        try:
            urls += map(system.unstrip_protocol, sorted(system.glob(path)))
        except Exception as error:  # each file system fails in its own way
            raise DataError(f"cannot list {shown(url)}: {reason_of(error)}", "name the files: {000..099}") from error
    if not urls:
        raise DataError(f"nothing matches {shown(pattern)}", "check data.source")
    return urls


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it; ConfigError: unknown, or its library is missing."""
    url_to_fs = require("fsspec.core", "remote").url_to_fs
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        is_missing = isinstance(error, ImportError)
        fix = "pip install 'torchmae[remote]'" if is_missing else "give a URL such as https://, s3:// or gs://"
        raise ConfigError(f"{shown(url)}: {reason_of(error)}", fix) from error


def place_version(place: Place) -> tuple[int, str]:
    """The size of a file and a text that changes with its content; DataError: no such file, or no known size."""
    if isinstance(place, Path):
        try:
            status = place.stat()
        except OSError as error:
            raise DataError(f"cannot read {place}: {reason_of(error)}") from error
        return status.st_size, str(status.st_mtime_ns)
    system, path = _file_system(place)
    info = _attempt(lambda: system.info(path), time.sleep, place)
    if not isinstance(info.get("size"), int):
        raise DataError(f"{shown(place)} does not say how large it is", "serve it with a Content-Length")
    return info["size"], digest(info.get(key, "") for key in (*_VERSION_KEYS, "mtime"))


def _attempt(request: Callable[[], Any], wait: Callable[[float], object], url: str) -> Any:
    """Makes a request up to `ATTEMPTS` times, with growing waits between them; DataError: all failed."""
    waits = [FIRST_WAIT_S * 2**i for i in range(ATTEMPTS - 1)]
    while True:
        try:
            return request()
        except (FileNotFoundError, PermissionError) as error:
            kind = "does not exist" if isinstance(error, FileNotFoundError) else "may not be read"
            raise DataError(f"{shown(url)} {kind}", "check the address and its credentials") from error
        except Exception as error:  # aiohttp, botocore and google have their own errors
            if not waits:
                problem = f"{shown(url)} cannot be fetched after {ATTEMPTS} attempts: {reason_of(error)}"
                raise DataError(problem, "check the network") from error
        wait(waits.pop(0))


class RemoteBytes:
    """A file at a URL, read by ranges.

    Fetched blocks are kept in a sparse file of the cache folder, each with a checksum. Processes may share it; after a
    crash, an eviction or a disk error, blocks are fetched again. `size` and `version` come from `place_version`; `wait`
    is called with seconds between attempts.
    """

    def __init__(self, url: str, size: int, version: str, wait: Callable[[float], object] = time.sleep) -> None:
        self.url, self.size, self._wait = url, size, wait
        stem = cache_folder() / "remote" / digest([url, size, version])
        self._data, self._sums = stem.with_suffix(".data"), stem.with_suffix(".sums")

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop - 1`, from the cache or the network; DataError: they cannot be fetched."""
        assert 0 <= start <= stop <= self.size
        if start == stop:
            return b""
        first = start // BLOCK
        content, at = bytearray(), first
        for is_kept, blocks in groupby(self._kept(first, (stop - 1) // BLOCK), bool):
            run = list(blocks)
            content += b"".join(run) if is_kept else self._fetch(at, at + len(run) - 1)
            at += len(run)
        return bytes(content[start - first * BLOCK : stop - first * BLOCK])

    def _kept(self, first: int, last: int) -> list[bytes]:
        """Blocks `first` to `last` from the cache; b"" for missing and damaged blocks."""
        count = last - first + 1
        try:
            with self._sums.open("rb") as file:
                file.seek(4 * first)
                known = np.frombuffer(file.read(4 * count).ljust(4 * count, b"\0"), dtype="<u4")
            with self._data.open("rb") as file:
                file.seek(BLOCK * first)
                blocks = [file.read(BLOCK) for _ in range(count)]
        except OSError:
            return [b""] * count
        return [block if checksum == _checksum(block) else b"" for block, checksum in zip(blocks, known, strict=True)]

    def _fetch(self, first: int, last: int) -> bytes:
        """Fetches blocks `first` to `last` and puts them into the cache."""
        start, stop = first * BLOCK, min((last + 1) * BLOCK, self.size)
        system, path = _file_system(self.url)

        def request() -> bytes:
            content: bytes = system.cat_file(path, start=start, end=stop)
            if len(content) != stop - start:
                ranges = "; does the server support ranges?" if len(content) > stop - start else ""
                raise OSError(f"{len(content)} bytes came in place of {stop - start}{ranges}")
            return content

        content: bytes = _attempt(request, self._wait, self.url)
        checksums = [_checksum(content[i : i + BLOCK]) for i in range(0, len(content), BLOCK)]
        with suppress(OSError):  # a full disk: go on without the cache
            self._data.parent.mkdir(parents=True, exist_ok=True)
            _write_at(self._data, BLOCK * first, content)
            _write_at(self._sums, 4 * first, np.array(checksums, dtype="<u4").tobytes())
            marker = cache_folder() / ".trimmed"  # shared by all processes
            if not marker.exists() or abs(time.time() - marker.stat().st_mtime) >= _TRIM_EVERY_S:
                marker.touch()
                trim(cache_limit())
        return content


def _write_at(path: Path, offset: int, content: bytes) -> None:
    """Writes at an offset of a file in which other processes may write other blocks; holes are allowed."""
    path.touch()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def _checksum(block: bytes) -> int:
    return zlib.crc32(block) or 1  # 0 means a missing block


def open_place(place: Place) -> IO[bytes]:
    """Opens a file for reading, a remote one through the cache; OSError (remote: DataError): it cannot be read."""
    if isinstance(place, Path):
        return place.open("rb")
    return io.BufferedReader(_RemoteFile(RemoteBytes(place, *place_version(place))), _READ_BUFFER)


class _RemoteFile(io.RawIOBase):
    def __init__(self, content: RemoteBytes) -> None:
        self._content, self._position = content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._content.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        start = min(self._position, self._content.size)
        content = self._content.read(start, min(start + len(buffer), self._content.size))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def cache_folder() -> Path:
    """TORCHMAE_CACHE, else torchmae/ in XDG_CACHE_HOME, else ~/.cache/torchmae; it may not exist yet."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return user_path(os.environ.get("TORCHMAE_CACHE") or f"{caches}/torchmae")


def cache_limit() -> int:
    """Largest size of the cache folder in bytes, from TORCHMAE_CACHE_GIB (50 if not set); ConfigError: no number."""
    given = os.environ.get("TORCHMAE_CACHE_GIB") or "50"
    with suppress(ValueError):
        if 0 < float(given) < float("inf"):
            return int(float(given) * 2**30)
    raise ConfigError(f"TORCHMAE_CACHE_GIB is {given!r}", "set it to a number of GiB above 0, or unset it")


def trim(limit: int) -> None:
    """Removes files that no process holds open from the cache folder, the oldest first, down to `limit` bytes."""
    groups: dict[Path, list[Path]] = defaultdict(list)  # files that belong together, by key
    for path in (path for name in _FOLDERS for path in (cache_folder() / name).glob("*")):
        if match := re.match(rf"(?:{WRITING}\d+-)?([0-9a-f]{{32}}(-[0-9a-f]{{32}})?)\.", path.name):
            groups[path.with_name(match[1])].append(path)
    entries = []
    for files in groups.values():
        with suppress(OSError):  # another process removed one
            states = [file.stat() for file in files]
            newest = max(state.st_mtime for state in states)
            # The blocks on disk, because sparse files take less than their size.
            size = sum(getattr(state, "st_blocks", state.st_size // 512) * 512 for state in states)
            being_written = any(file.name.startswith(WRITING) for file in files)
            if not being_written or newest < time.time() - _ABANDONED_S:
                entries.append((newest, size, sorted(files)))
    total = sum(size for _, size, _ in entries)
    for _, size, files in sorted(entries):
        if total <= limit:
            return
        if remove_unless_open(files):
            total -= size
