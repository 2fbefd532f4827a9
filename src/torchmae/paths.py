"""Paths as people type them."""

from __future__ import annotations

from pathlib import Path

from torchmae.errors import ConfigError


def user_path(path: str | Path) -> Path:
    """The path with `~` and `~NAME` replaced by the home folder they stand for.

    Raises:
        ConfigError: no such home folder is known (HOME is not set and the system does not know the user).
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"no home folder is known for the ~ in {path}", "give the whole path, or set HOME") from error
