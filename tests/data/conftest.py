"""Folders of pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from picture_files import picture
from PIL import Image

Writer = Callable[..., list[Path]]


@pytest.fixture
def write_pictures(tmp_path: Path) -> Writer:
    """Writes one picture to each name, all different, under `tmp_path`."""

    def write(*names: str, size: tuple[int, int] = (12, 16)) -> list[Path]:
        paths = [tmp_path / name for name in names]
        for i, path in enumerate(paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(*size, seed=i)).save(path)
        return paths

    return write
