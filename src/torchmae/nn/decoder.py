"""Decoders: from the tokens of visible patches to the pixels of hidden ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmae.nn.encoder import EncoderOutput
from torchmae.nn.layers import LAYER_NORM_EPS, Block, CrossBlock, init_linear
from torchmae.nn.masking import Mask
from torchmae.nn.positions import resample, sincos


class _Decoder(nn.Module, ABC):
    """What the two decoders share: the embedding of tokens, the mask token, positions, and the prediction.

    Under autocast tokens are in its precision from the embedding on, sums included, where the encoder's stay fp32:
    docs/performance.md says what that is worth.
    """

    pos_embed: Tensor

    def __init__(self, encoder_dim: int, grid: Sequence[int], embed_dim: int, patch_dim: int) -> None:
        super().__init__()
        self.grid = tuple(grid)
        self.embed = nn.Linear(encoder_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim).normal_(std=0.02))
        self.register_buffer("pos_embed", sincos(embed_dim, self.grid)[None])
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.pred = nn.Linear(embed_dim, patch_dim)

    def positions(self, ids: Tensor, grid: tuple[int, ...]) -> Tensor:
        """(B, K, D) for (B, K) patch indices."""
        return F.embedding(ids, resample(self.pos_embed[0], self.grid, grid))

    def forward(self, encoded: EncoderOutput, mask: Mask, grid: tuple[int, ...] | None = None) -> Tensor:
        """Predicts the masked patches: (B, M, P), in the order of `mask.ids_masked`."""
        prediction: Tensor = self.pred(self.tokens(encoded, mask, grid))
        return prediction

    @abstractmethod
    def tokens(self, encoded: EncoderOutput, mask: Mask, grid: tuple[int, ...] | None = None) -> Tensor:
        """What the prediction is made from: (B, M, D), normalised, in the order of `mask.ids_masked`."""


class SelfDecoder(_Decoder):
    """The paper's decoder (section 3): self-attention over visible tokens and mask tokens.

    Tokens stand in the order [class, visible, masked]: attention does not care, so nothing is put back in place.

    Args:
        encoder_dim: width of the encoder's tokens.
        grid: patches along each axis.
        embed_dim: width.
        depth: blocks.
        num_heads: attention heads; divides `embed_dim`.
        patch_dim: values in a patch, P.
        mlp_ratio: hidden width of a block's MLP over `embed_dim`.
    """

    def __init__(
        self,
        encoder_dim: int,
        grid: Sequence[int],
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        patch_dim: int,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__(encoder_dim, grid, embed_dim, patch_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.apply(init_linear)

    def tokens(self, encoded: EncoderOutput, mask: Mask, grid: tuple[int, ...] | None = None) -> Tensor:
        """What the prediction is made from: (B, M, D), normalised, in the order of `mask.ids_masked`."""
        grid = grid or self.grid
        visible = self.embed(encoded.patches)
        visible = visible + self.positions(mask.ids_keep, grid).to(visible.dtype)
        masked = (self.mask_token + self.positions(mask.ids_masked, grid)).to(visible.dtype)
        x = torch.cat([self.embed(encoded.prefix), visible, masked], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, -mask.ids_masked.shape[1] :])


class CrossDecoder(_Decoder):
    """CrossMAE's decoder (Fu et al. 2024, arXiv 2401.14391): masked patches attend to visible tokens, not each other.

    With `feature_weights`, each block reads its own learned mixture of the encoder's layers, the embedding included
    (section 3.4); without, all read the last layer. A mixture begins as the last layer alone.

    Departure: the visible tokens are given their positions again, as in the paper's own decoder.

    Args:
        encoder_dim: width of the encoder's tokens.
        grid: patches along each axis.
        embed_dim: width.
        depth: blocks.
        num_heads: attention heads; divides `embed_dim`.
        patch_dim: values in a patch, P.
        mlp_ratio: hidden width of a block's MLP over `embed_dim`.
        feature_weights: how many layers of the encoder are mixed; 0: none.
    """

    def __init__(
        self,
        encoder_dim: int,
        grid: Sequence[int],
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        patch_dim: int,
        mlp_ratio: float = 4.0,
        feature_weights: int = 0,
    ) -> None:
        super().__init__(encoder_dim, grid, embed_dim, patch_dim)
        self.blocks = nn.ModuleList(CrossBlock(embed_dim, embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.apply(init_linear)
        self.feature_weights: nn.Parameter | None = None
        if feature_weights:
            self.feature_norm = nn.LayerNorm(encoder_dim, eps=LAYER_NORM_EPS)
            self.feature_weights = nn.Parameter(torch.zeros(depth, feature_weights))
            self.feature_weights.data[:, -1] = 1.0

    def tokens(self, encoded: EncoderOutput, mask: Mask, grid: tuple[int, ...] | None = None) -> Tensor:
        """What the prediction is made from: (B, M, D), normalised, in the order of `mask.ids_masked`.

        `mask` may name fewer masked patches than there are: each is predicted alone.
        """
        grid = grid or self.grid
        x = self.mask_token + self.positions(mask.ids_masked, grid)
        prefix, positions = encoded.prefix.shape[1], self.positions(mask.ids_keep, grid)
        for i, block in enumerate(self.blocks):
            if i == 0 or self.feature_weights is not None:
                context = self.embed(self._features(encoded, i))
                context = torch.cat([context[:, :prefix], context[:, prefix:] + positions.to(context.dtype)], dim=1)
                x = x.to(context.dtype)
            x = block(x, context)
        return self.norm(x)

    def _features(self, encoded: EncoderOutput, block: int) -> Tensor:
        """(B, prefix + K, encoder_dim): what a block reads."""
        if self.feature_weights is None:
            return torch.cat([encoded.prefix, encoded.patches], dim=1)
        weights = self.feature_weights[block]
        mixed = sum(weight * layer for weight, layer in zip(weights, encoded.blocks, strict=True))
        return self.feature_norm(mixed)


DECODERS: dict[str, type[SelfDecoder] | type[CrossDecoder]] = {"self": SelfDecoder, "cross": CrossDecoder}
