"""Runs that learned nothing, and a few images to try them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from torchmae import presets
from torchmae.config import DataConfig, PretrainConfig
from torchmae.settings import to_yaml
from torchmae.training.saved_model import Description, write_description, write_weights


def write_run(folder: Path, images: Path | None = None, *, seed: int = 0, **changes: Any) -> Path:
    """A run folder; `images` is what it says that it was trained on."""
    shape = {"input_size": (16, 24), "patch_size": (4, 4), "in_chans": 3, **changes}
    arguments = presets.arguments("vit_digits", embed_dim=16, depth=1, num_heads=2, decoder_depth=1, **shape)
    torch.manual_seed(seed)
    weights = presets.construct(arguments).state_dict()
    channels = shape["in_chans"]
    mask = {"strategy": "random", "ratio": 0.75}
    folder.mkdir(parents=True)
    description = Description(arguments, (0.5,) * channels, (0.25,) * channels, mask, ("apple", "pear"), "0")
    write_description(folder / "model.json", description)
    write_weights(folder / "model.safetensors", weights)
    if images is not None:
        config = PretrainConfig(data=DataConfig(source=str(images), num_workers=0))
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return folder


def write_images(folder: Path, count: int = 12) -> Path:
    """Smooth random colour images in two class folders."""
    for number in range(count):
        coarse = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        path = folder / ("apple", "pear")[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((36, 24), Image.Resampling.BICUBIC).save(path)
    return folder
