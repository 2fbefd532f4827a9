"""Networks small enough for tests, and what peers make of the same weights."""

from __future__ import annotations

from typing import Any

import torch

from torchmae.nn.classifier import ViTClassifier
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.presets import construct
from torchmae.publish.exports import Exported
from torchmae.training.saved_model import Description

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
ENCODER: dict[str, Any] = {
    "input_size": (16, 16),
    "patch_size": (4, 4),
    "in_chans": 3,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
}
DECODER: dict[str, Any] = {"decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 3}


def shaken(model: Any) -> Any:
    """Moves every parameter off its initial value, so that zero biases and unit norms hide no difference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def mae(**overrides: Any) -> MaskedAutoencoder:
    return shaken(construct({**ENCODER, **DECODER, **overrides}))


def classifier(num_classes: int = 5, **overrides: Any) -> ViTClassifier:
    return shaken(ViTClassifier(num_classes, **{**ENCODER, **overrides}))


def exported(model: MaskedAutoencoder) -> Exported:
    channels = model.encoder.in_chans
    return Exported(model, Description({}, MEAN[:channels], STD[:channels], {}, None, "0.1.0"))
