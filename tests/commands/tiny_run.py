"""The folder of a run on digits that learned nothing, and weights of others."""

from __future__ import annotations

from pathlib import Path

import torch

from torchmae import presets
from torchmae.config import PretrainConfig
from torchmae.interop import names
from torchmae.settings import to_yaml
from torchmae.training.saved_model import Description, write_description, write_weights


def write_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    arguments = presets.arguments("vit_digits", embed_dim=16, depth=1, num_heads=2, decoder_depth=1)
    torch.manual_seed(0)
    weights = presets.construct(arguments).state_dict()
    mask = {"strategy": "random", "ratio": 0.75}
    write_description(folder / "model.json", Description(arguments, (0.3,), (0.38,), mask, None, "0"))
    write_weights(folder / "model.safetensors", weights)
    (folder / "config.yaml").write_text(to_yaml(PretrainConfig()), encoding="utf-8")
    return folder


def write_others_weights(path: Path) -> Path:
    """A checkpoint in the released layout for 32 x 32 colour images; it does not say what its decoder predicts."""
    arguments = presets.arguments("vit_tiny", input_size=(32, 32), depth=1, decoder_embed_dim=512, decoder_depth=1)
    torch.manual_seed(0)
    torch.save({"model": names.to_official(presets.construct(arguments).state_dict())}, path)
    return path
