"""An encoder of patches with a light decoder to pixels."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from torchmae.nn.encoder import Encoder

_GROUPS = 8


class Segmenter(nn.Module):
    """Patch tokens as an image, two convolutions at twice and four times their resolution, and bilinear upsampling.

    Args:
        encoder: of pictures; it becomes a part of the segmenter.
        num_classes: K.
        width: channels of the decoder, a multiple of 8.
    """

    def __init__(self, encoder: Encoder, num_classes: int, width: int = 128) -> None:
        super().__init__()
        self.encoder = encoder
        layers: list[nn.Module] = [nn.Conv2d(encoder.embed_dim, width, 1), nn.GroupNorm(_GROUPS, width), nn.GELU()]
        for _ in range(min(2, int(math.log2(min(encoder.patch_size))))):
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear"))
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(_GROUPS, width), nn.GELU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(width, num_classes, 1))

    @property
    def blocks(self) -> nn.ModuleList:
        """The encoder's."""
        return self.encoder.blocks

    def layer_of(self, name: str) -> int:
        """The layer of a parameter, as `Encoder.layer_of`; the decoder is the last one."""
        part, _, rest = name.partition(".")
        return self.encoder.layer_of(rest) if part == "encoder" else len(self.blocks) + 1

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, h, w) to logits (B, K, h, w)."""
        encoded = self.encoder(images)
        features = encoded.patches.transpose(1, 2).unflatten(2, encoded.grid)
        return F.interpolate(self.decoder(features), size=images.shape[2:], mode="bilinear", align_corners=False)
