"""Makes pictures to read."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image


def picture(height: int = 12, width: int = 16, seed: int = 0) -> np.ndarray:
    """A smooth RGB picture of (height, width, 3) uint8, so that JPEG and resampling keep it recognisable."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
