"""Floating-point operations of a model, by formula.

Only matrix products count, as in `torch.utils.flop_counter`: 2 m n k for an (m, k) by (k, n) product. Norms, GELU,
softmax and the optimiser are left out, because memory bandwidth limits them.
"""

from __future__ import annotations

from typing import NamedTuple

from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import num_keep


class Flops(NamedTuple):
    """Operations of a forward pass of one image."""

    patch_embed: int
    encoder: int  # the blocks
    decoder: int  # embedding, blocks and predictions

    @property
    def forward(self) -> int:
        """One forward pass."""
        return self.patch_embed + self.encoder + self.decoder

    @property
    def training(self) -> int:
        """A forward and a backward pass: three forward passes, less the gradient of the pixels, which nothing needs."""
        return 3 * self.forward - self.patch_embed

    @property
    def recomputed(self) -> int:
        """`training` with activation checkpointing: the blocks run a second time in the backward pass."""
        return self.training + self.encoder + self.decoder


def count_flops(model: MaskedAutoencoder, mask_ratio: float) -> Flops:
    """Operations of pre-training for one image of the model's `input_size`; ConfigError: a ratio outside (0, 1).

    The model may be on any device, "meta" too.
    """
    encoder, decoder = model.encoder, model.decoder
    kept = num_keep(encoder.num_patches, mask_ratio)
    masked = max(1, round((encoder.num_patches - kept) * model.predict_ratio))
    heads = 2 * masked * decoder.embed_dim * sum(target.dim for target in model.targets)
    blocks = decoder.flops(kept + encoder.num_prefix_tokens, masked)
    return Flops(*encoder.flops(kept), blocks + heads)
