"""Floating-point operations of a model, by formula: what a step must compute, whatever computes it.

Matrix products only, a multiplication and an addition each (2 m n k for an (m, k) by (k, n) product), which is what
`torch.utils.flop_counter` counts. Norms, GELU, softmax and the optimiser are left out: they are bound by memory.
"""

from __future__ import annotations

from typing import NamedTuple

from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import num_keep


class Flops(NamedTuple):
    """Operations for one image.

    Attributes:
        patch_embed: of the layer that embeds patches; its input needs no gradient.
        encoder: of a forward pass through the encoder's blocks.
        decoder: of a forward pass through the decoder, its embedding and its prediction.
    """

    patch_embed: int
    encoder: int
    decoder: int

    @property
    def forward(self) -> int:
        """One forward pass."""
        return self.patch_embed + self.encoder + self.decoder

    @property
    def training(self) -> int:
        """A forward and a backward pass: three times a forward one, less the gradient of the pixels."""
        return 3 * self.forward - self.patch_embed

    @property
    def recomputed(self) -> int:
        """`training` with the blocks' activations computed a second time in the backward pass, to save memory."""
        return self.training + self.encoder + self.decoder


def count_flops(model: MaskedAutoencoder, mask_ratio: float) -> Flops:
    """Operations of pre-training on one image of the size that a model is made for.

    Args:
        model: on any device, "meta" too.
        mask_ratio: share of the patches that is masked; the encoder sees the others only.

    Raises:
        ConfigError: a ratio outside (0, 1).
    """
    encoder, decoder = model.encoder, model.decoder
    kept = num_keep(encoder.num_patches, mask_ratio)
    masked = max(1, round((encoder.num_patches - kept) * model.predict_ratio))
    heads = 2 * masked * decoder.embed_dim * sum(target.dim for target in model.targets)
    blocks = decoder.flops(kept + encoder.num_prefix_tokens, masked)
    return Flops(*encoder.flops(kept), blocks + heads)
