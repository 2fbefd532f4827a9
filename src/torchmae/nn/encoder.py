"""The vision transformer encoder. Its state_dict is a timm VisionTransformer's; only it knows of the class token."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmae.errors import ConfigError, within
from torchmae.nn.layers import LAYER_NORM_EPS, Block, init_linear
from torchmae.nn.patches import gather, grid_size, patchify
from torchmae.nn.positions import resample, sincos

_CONVOLUTION: dict[int, type[Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class EncoderOutput(NamedTuple):
    """Normalised tokens.

    Attributes:
        prefix: (B, 1, D), the class token; (B, 0, D) without one.
        patches: (B, K, D), the patch tokens in the order they were given.
        blocks: what each block was given, and what the last one gave: depth + 1 times (B, prefix + K, D), before the
            final norm; empty unless asked for.
    """

    prefix: Tensor
    patches: Tensor
    blocks: tuple[Tensor, ...] = ()


class PatchEmbed(nn.Module):
    """Patches to tokens. The weight has the shape of timm's convolution; it is applied as a linear layer.

    Args:
        patch_size: pixels along each of 1, 2 or 3 axes.
        in_chans: channels.
        embed_dim: width of a token.
    """

    def __init__(self, patch_size: Sequence[int], in_chans: int, embed_dim: int) -> None:
        super().__init__()
        size = tuple(patch_size)
        self.proj = _CONVOLUTION[len(size)](in_chans, embed_dim, size, size)
        nn.init.xavier_uniform_(self.proj.weight.data.view(embed_dim, -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, K, P), channels last within a patch, to (B, K, D)."""
        weight = self.proj.weight.movedim(1, -1).flatten(1)
        return F.linear(patches, weight, self.proj.bias)


class ViTEncoder(nn.Module):
    """A vision transformer that sees any subset of an image's patches.

    Args:
        input_size: pixels along each of 1, 2 or 3 axes.
        patch_size: likewise; divides `input_size`.
        in_chans: channels.
        embed_dim: width of a token.
        depth: blocks.
        num_heads: attention heads; divides `embed_dim`.
        mlp_ratio: hidden width of a block's MLP over `embed_dim`.
        class_token: prepend a class token.
        drop_path: stochastic depth rate of the last block, rising linearly from 0.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        input_size: Sequence[int],
        patch_size: Sequence[int],
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        within("drop_path", drop_path, 0, 1, open_high=True)
        self.grid = grid_size(input_size, patch_size)
        self.patch_size = tuple(patch_size)
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.num_prefix_tokens = int(class_token)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim).normal_(std=0.02)) if class_token else None
        self.register_buffer("pos_embed", sincos(embed_dim, self.grid, self.num_prefix_tokens)[None])
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, drop_path * i / max(depth - 1, 1)) for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.apply(init_linear)
        self.patch_embed = PatchEmbed(self.patch_size, in_chans, embed_dim)

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> EncoderOutput:
        """Encodes all patches of the images, or those named.

        Args:
            images: (B, C, *size) float; a size other than the one trained on has its positions resampled.
            ids_keep: (B, K) int64 patch indices; None: all.
        """
        self.check(images)
        patches = patchify(images, self.patch_size)
        if ids_keep is not None:
            patches = gather(patches, ids_keep)
        return self.forward_patches(patches, ids_keep, grid_size(images.shape[2:], self.patch_size))

    def forward_patches(
        self,
        patches: Tensor,
        ids: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        *,
        keep_blocks: bool = False,
    ) -> EncoderOutput:
        """Encodes raw patches.

        Args:
            patches: (B, K, P) as `patchify` cuts them.
            ids: (B, K) their indices in the grid; None: all, in order.
            grid: the grid they were cut from; None: the one trained on.
            keep_blocks: give the tokens between blocks too.
        """
        x = self.patch_embed(patches)
        positions = self.positions(grid or self.grid)
        patch_positions = positions[self.num_prefix_tokens :]
        x = x + (patch_positions if ids is None else F.embedding(ids, patch_positions))
        if self.cls_token is not None:
            prefix = (self.cls_token + positions[:1]).to(x.dtype)
            x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
        between = [x]
        for block in self.blocks:
            x = block(x)
            between.append(x)
        x = self.norm(x)
        prefix, patches = x.tensor_split((self.num_prefix_tokens,), dim=1)
        return EncoderOutput(prefix, patches, tuple(between) if keep_blocks else ())

    def check(self, images: Tensor) -> None:
        """Raises ConfigError for images of another number of channels or axes."""
        if images.ndim != len(self.patch_size) + 2 or images.shape[1] != self.in_chans:
            raise ConfigError(
                f"images have shape {tuple(images.shape)}",
                f"this model takes (batch, {self.in_chans}, {', '.join(['size'] * len(self.patch_size))})",
            )

    def positions(self, grid: tuple[int, ...]) -> Tensor:
        """(num_prefix + L, D), resampled where `grid` is not the one trained on."""
        return resample(self.pos_embed[0], self.grid, grid)

    @property
    def num_patches(self) -> int:
        """L, the patches of an image of the size trained on."""
        return prod(self.grid)
