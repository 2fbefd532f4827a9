"""The folder for what is made once from data that lies elsewhere: indexes, unpacked tables, parts of remote files."""

from __future__ import annotations

import os
from pathlib import Path

from torchmae.errors import ConfigError

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
