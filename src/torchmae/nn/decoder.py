"""Decoders: from the tokens of visible patches to those of masked ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmae.nn.encoder import EncoderOutput
from torchmae.nn.layers import LAYER_NORM_EPS, Block, CrossBlock, blocks_flops, init_linear
from torchmae.nn.masking import Mask
from torchmae.nn.positions import resample, sincos


class Decoder(nn.Module, ABC):
    """What a model asks of a decoder: `forward(encoded, mask)`, and what stands here.

    `forward` gives what the masked patches are predicted from, (B, M, embed_dim), in the order of `mask.ids_masked`. A
    decoder may bring a layer `pred`, the head of the model's first target: the released weights have it there.

    Attributes:
        embed_dim: width of its tokens.
        reads_blocks: it reads the encoder's `blocks`.
        predicts_alone: masked patches are predicted one by one, so that fewer may be asked for.
        as_published: the decoder of the paper, which other libraries have too.
        blocks: as those of an encoder.
        absent: for the place of a decoder that was not loaded: the reason, and what to do about it.
    """

    embed_dim: int
    reads_blocks: bool = False
    predicts_alone: bool = False
    as_published: bool = False
    absent: tuple[str, str] | None = None
    blocks: nn.ModuleList

    @abstractmethod
    def flops(self, seen: int, masked: int) -> int:
        """Operations for one image of which `seen` tokens come from the encoder and `masked` patches are predicted."""


class _PatchDecoder(Decoder):
    """What the two decoders share: the embedding of tokens, the mask token, positions, the norm and the first head.

    Under autocast tokens are in its precision from the embedding on, sums included, where the encoder's stay fp32:
    docs/performance.md says what that is worth.
    """

    pos_embed: Tensor

    def __init__(self, encoder_dim: int, grid: Sequence[int], embed_dim: int, out_dim: int) -> None:
        super().__init__()
        self.grid = tuple(grid)
        self.embed_dim = embed_dim
        self.embed = nn.Linear(encoder_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim).normal_(std=0.02))
        self.register_buffer("pos_embed", sincos(embed_dim, self.grid)[None])
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        if out_dim:
            self.pred = nn.Linear(embed_dim, out_dim)

    def positions(self, ids: Tensor, grid: tuple[int, ...]) -> Tensor:
        """(B, K, D) for (B, K) patch indices."""
        return F.embedding(ids, resample(self.pos_embed[0], self.grid, grid))


class SelfDecoder(_PatchDecoder):
    """The paper's decoder (section 3): self-attention over visible tokens and mask tokens.

    Tokens stand in the order [class, visible, masked]: attention does not care, so nothing is put back in place.

    Args:
        encoder_dim: width of the encoder's tokens.
        grid: patches along each axis.
        embed_dim: width.
        depth: blocks.
        num_heads: attention heads; divides `embed_dim`.
        out_dim: values that the first target has for each patch; 0: the decoder brings no head.
        mlp_ratio: hidden width of a block's MLP over `embed_dim`.
    """

    as_published = True

    def __init__(
        self,
        encoder_dim: int,
        grid: Sequence[int],
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        out_dim: int = 0,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__(encoder_dim, grid, embed_dim, out_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.apply(init_linear)

    def forward(self, encoded: EncoderOutput, mask: Mask) -> Tensor:
        """What predictions are made from: (B, M, D), normalised, in the order of `mask.ids_masked`."""
        grid = encoded.grid
        visible = self.embed(encoded.patches)
        visible = visible + self.positions(mask.ids_keep, grid).to(visible.dtype)
        masked = (self.mask_token + self.positions(mask.ids_masked, grid)).to(visible.dtype)
        x = torch.cat([self.embed(encoded.prefix), visible, masked], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, -mask.ids_masked.shape[1] :])

    def flops(self, seen: int, masked: int) -> int:
        """Operations for one image."""
        embed = 2 * seen * self.embed.in_features * self.embed_dim
        return embed + blocks_flops(self.blocks, seen + masked)


class CrossDecoder(_PatchDecoder):
    """CrossMAE's decoder (Fu et al. 2024, arXiv 2401.14391): masked patches attend to visible tokens, not each other.

    With `feature_weights`, each block reads its own learned mixture of the encoder's layers, the embedding included
    (section 3.4); without, all read the last layer.

    Departures: the visible tokens are given their positions again, as in MAE's own decoder; a mixture begins as the
    last layer alone, and all blocks share one norm of it.

    Args:
        encoder_dim: width of the encoder's tokens.
        grid: patches along each axis.
        embed_dim: width.
        depth: blocks.
        num_heads: attention heads; divides `embed_dim`.
        out_dim: values that the first target has for each patch; 0: the decoder brings no head.
        mlp_ratio: hidden width of a block's MLP over `embed_dim`.
        feature_weights: how many layers of the encoder are mixed; 0: none.
    """

    predicts_alone = True

    def __init__(
        self,
        encoder_dim: int,
        grid: Sequence[int],
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        out_dim: int = 0,
        mlp_ratio: float = 4.0,
        feature_weights: int = 0,
    ) -> None:
        super().__init__(encoder_dim, grid, embed_dim, out_dim)
        self.blocks = nn.ModuleList(CrossBlock(embed_dim, embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.apply(init_linear)
        self.feature_weights: nn.Parameter | None = None
        self.reads_blocks = bool(feature_weights)
        if feature_weights:
            self.feature_norm = nn.LayerNorm(encoder_dim, eps=LAYER_NORM_EPS)
            self.feature_weights = nn.Parameter(torch.zeros(depth, feature_weights))
            self.feature_weights.data[:, -1] = 1.0

    def forward(self, encoded: EncoderOutput, mask: Mask) -> Tensor:
        """What predictions are made from: (B, M, D), normalised, in the order of `mask.ids_masked`.

        `mask` may name fewer masked patches than there are: each is predicted alone.
        """
        grid = encoded.grid
        x = self.mask_token + self.positions(mask.ids_masked, grid)
        prefix, positions = encoded.prefix.shape[1], self.positions(mask.ids_keep, grid)
        for i, block in enumerate(self.blocks):
            if i == 0 or self.feature_weights is not None:
                context = self.embed(self._features(encoded, i))
                context = torch.cat([context[:, :prefix], context[:, prefix:] + positions.to(context.dtype)], dim=1)
                x = x.to(context.dtype)
            x = block(x, context)
        return self.norm(x)

    def flops(self, seen: int, masked: int) -> int:
        """Operations for one image."""
        embed = 2 * seen * self.embed.in_features * self.embed_dim
        embeddings = len(self.blocks) if self.reads_blocks else 1
        return embed * embeddings + blocks_flops(self.blocks, masked, seen)

    def _features(self, encoded: EncoderOutput, block: int) -> Tensor:
        """(B, prefix + K, encoder_dim): what a block reads."""
        if self.feature_weights is None:
            return torch.cat([encoded.prefix, encoded.patches], dim=1)
        weights = self.feature_weights[block]
        mixed = sum(weight * layer for weight, layer in zip(weights, encoded.blocks, strict=True))
        return self.feature_norm(mixed)


DECODERS: dict[str, type[SelfDecoder] | type[CrossDecoder]] = {"self": SelfDecoder, "cross": CrossDecoder}
