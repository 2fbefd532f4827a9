"""Decoders turn the tokens of visible patches into tokens of the masked ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmae.nn.encoder import EncoderOutput
from torchmae.nn.layers import LAYER_NORM_EPS, Block, CrossBlock, blocks_flops, init_linear
from torchmae.nn.masking import Mask
from torchmae.nn.positions import resample, sincos


class Decoder(nn.Module, ABC):
    """The interface of a decoder: `forward(encoded, mask)`, and these attributes.

    `forward` gives the tokens (B, M, embed_dim) that predictions are made from, in the order of `mask.ids_masked`. A
    decoder may have a layer `pred`, the head of the model's first target, as in the released weights.

    Attributes:
        embed_dim: width of its tokens.
        reads_blocks: it reads the encoder's `blocks`.
        predicts_alone: each masked patch is predicted independently, so that a part of them can be predicted.
        as_published: the decoder of the paper, which other libraries have too.
        blocks: layers that are checkpointed, compiled and sharded one by one.
        absent: the problem and the fix where this stands for a decoder that was not loaded; None: a decoder.
    """

    embed_dim: int
    reads_blocks: bool = False
    predicts_alone: bool = False
    as_published: bool = False
    absent: tuple[str, str] | None = None
    blocks: nn.ModuleList

    @abstractmethod
    def flops(self, seen: int, masked: int) -> int:
        """Operations for one image with `seen` tokens of the encoder and `masked` patches to predict."""


class _PatchDecoder(Decoder):
    """The common part of both decoders: embedding, mask token, positions, blocks, norm and the first target's head.

    `out_dim` is the number of values that the first target has for each patch; 0: no head `pred`. The other arguments
    are those of `ViTEncoder`. Under autocast, tokens have its precision from the embedding on, where the encoder's stay
    fp32 (docs/performance.md).
    """

    block: type[Block] | type[CrossBlock]
    pos_embed: Tensor

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
        super().__init__()
        self.grid = tuple(grid)
        self.embed_dim = embed_dim
        self.embed = nn.Linear(encoder_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim).normal_(std=0.02))
        self.register_buffer("pos_embed", sincos(embed_dim, self.grid)[None])
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        if out_dim:
            self.pred = nn.Linear(embed_dim, out_dim)
        self.blocks = nn.ModuleList(self.block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.apply(init_linear)

    def positions(self, ids: Tensor, grid: tuple[int, ...]) -> Tensor:
        """(B, K, D) for (B, K) patch indices."""
        return F.embedding(ids, resample(self.pos_embed[0], self.grid, grid))


class SelfDecoder(_PatchDecoder):
    """The paper's decoder (section 3): self-attention over visible tokens and mask tokens.

    Tokens stand in the order [class, visible, masked]. Attention does not depend on the order, so nothing is
    un-shuffled.
    """

    as_published = True
    block = Block

    def forward(self, encoded: EncoderOutput, mask: Mask) -> Tensor:
        """As `Decoder` says; the tokens are normalised."""
        grid = encoded.grid
        visible = self.embed(encoded.patches)
        visible = visible + self.positions(mask.ids_keep, grid).to(visible.dtype)
        masked = (self.mask_token + self.positions(mask.ids_masked, grid)).to(visible.dtype)
        x = torch.cat([self.embed(encoded.prefix), visible, masked], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, -mask.ids_masked.shape[1] :])

    def flops(self, seen: int, masked: int) -> int:
        """As `Decoder.flops`."""
        embed = 2 * seen * self.embed.in_features * self.embed_dim
        return embed + blocks_flops(self.blocks, seen + masked)


class CrossDecoder(_PatchDecoder):
    """CrossMAE's decoder (Fu et al. 2024, arXiv 2401.14391): masked patches attend to visible tokens, not each other.

    If `feature_weights` is above 0, each block reads its own learned mixture of that number of encoder layers, the
    embedding included (section 3.4); else all blocks read the last layer.

    Departures: the visible tokens get their positions again, as in MAE's own decoder. A mixture starts as the last
    layer alone. All blocks share one norm of the mixture.
    """

    predicts_alone = True
    block = CrossBlock

    def __init__(self, encoder_dim: int, grid: Sequence[int], *, feature_weights: int = 0, **sizes: Any) -> None:
        super().__init__(encoder_dim, grid, **sizes)
        self.feature_weights: nn.Parameter | None = None
        self.reads_blocks = bool(feature_weights)
        if feature_weights:
            self.feature_norm = nn.LayerNorm(encoder_dim, eps=LAYER_NORM_EPS)
            self.feature_weights = nn.Parameter(torch.zeros(len(self.blocks), feature_weights))
            self.feature_weights.data[:, -1] = 1.0

    def forward(self, encoded: EncoderOutput, mask: Mask) -> Tensor:
        """As `Decoder` says; the tokens are normalised. `mask.ids_masked` may be a part of the masked patches."""
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
        """As `Decoder.flops`."""
        embed = 2 * seen * self.embed.in_features * self.embed_dim
        embeddings = len(self.blocks) if self.reads_blocks else 1
        return embed * embeddings + blocks_flops(self.blocks, masked, seen)

    def _features(self, encoded: EncoderOutput, block: int) -> Tensor:
        """(B, prefix + K, encoder_dim): the encoder's tokens that a block attends to."""
        if self.feature_weights is None:
            return torch.cat([encoded.prefix, encoded.patches], dim=1)
        weights = self.feature_weights[block]
        mixed = sum(weight * layer for weight, layer in zip(weights, encoded.blocks, strict=True))
        return self.feature_norm(mixed)


DECODERS: dict[str, type[SelfDecoder] | type[CrossDecoder]] = {"self": SelfDecoder, "cross": CrossDecoder}
