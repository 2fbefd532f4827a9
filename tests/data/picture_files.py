"""Makes pictures to read."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torchmae.data.formats import open_item
from torchmae.data.items import Context, Item


def picture(height: int = 12, width: int = 16, seed: int = 0) -> np.ndarray:
    """A smooth RGB picture of (height, width, 3) uint8, so that JPEG and resampling keep it recognisable."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def opened(raw: bytes, channels: int | None = None, **options: object) -> Item:
    return open_item(raw, Context(num_channels=channels, **options))


def decode(raw: bytes, channels: int | None = None, **options: object) -> np.ndarray:
    return opened(raw, channels, **options).read()


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_parquet(path: Path, rows: list[dict], metadata: bytes | None = None) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.Table.from_pylist(rows)
    if metadata is not None:
        table = table.replace_schema_metadata({b"huggingface": metadata})
    parquet.write_table(table, path)


def rows_of(count: int, seed: int = 0) -> list[dict]:
    return [
        {"image": {"bytes": encoded(Image.fromarray(picture(seed=seed + i))), "path": f"{i}.png"}, "label": i % 3}
        for i in range(count)
    ]
