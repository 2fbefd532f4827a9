"""Decoders: from the tokens of visible patches to the pixels of hidden ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmae.nn.encoder import EncoderOutput
from torchmae.nn.layers import LAYER_NORM_EPS, Block, CrossBlock, init_linear
from torchmae.nn.masking import Mask
from torchmae.nn.positions import resample, sincos


class _Decoder(nn.Module):
    """What the two decoders share: the embedding of tokens, the mask token, positions, and the prediction."""

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

    def forward(self, encoded: EncoderOutput, mask: Mask, grid: tuple[int, ...] | None = None) -> Tensor:
        """Predicts the masked patches: (B, M, P), in the order of `mask.ids_masked`."""
        grid = grid or self.grid
        visible = self.embed(encoded.patches)
        visible = visible + self.positions(mask.ids_keep, grid).to(visible.dtype)
        masked = (self.mask_token + self.positions(mask.ids_masked, grid)).to(visible.dtype)
        x = torch.cat([self.embed(encoded.prefix), visible, masked], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x[:, -mask.ids_masked.shape[1] :]))


class CrossDecoder(_Decoder):
    """CrossMAE's decoder (Fu et al. 2024, arXiv 2401.14391): masked patches attend to visible tokens, not each other.

    Departure: its blocks all read the encoder's last layer, not learned mixtures of several; and the visible tokens
    are given their positions again, as in the paper's own decoder.

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
        self.blocks = nn.ModuleList(CrossBlock(embed_dim, embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.apply(init_linear)

    def forward(self, encoded: EncoderOutput, mask: Mask, grid: tuple[int, ...] | None = None) -> Tensor:
        """Predicts the masked patches: (B, M, P), in the order of `mask.ids_masked`."""
        grid = grid or self.grid
        visible = self.embed(encoded.patches)
        visible = visible + self.positions(mask.ids_keep, grid).to(visible.dtype)
        context = torch.cat([self.embed(encoded.prefix), visible], dim=1)
        x = (self.mask_token + self.positions(mask.ids_masked, grid)).to(visible.dtype)
        for block in self.blocks:
            x = block(x, context)
        return self.pred(self.norm(x))


DECODERS: dict[str, type[SelfDecoder] | type[CrossDecoder]] = {"self": SelfDecoder, "cross": CrossDecoder}
