"""Encoders: from the visible patches of images to tokens. The vision transformer's state_dict is timm's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmae.errors import ConfigError, within
from torchmae.nn.layers import LAYER_NORM_EPS, Block, blocks_flops, init_linear
from torchmae.nn.masking import STRATEGIES, Strategy
from torchmae.nn.patches import gather, grid_size, patchify
from torchmae.nn.positions import resample, sincos

CONVOLUTIONS: dict[int, type[Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TIMM = {192: "vit_tiny", 384: "vit_small", 768: "vit_base", 1024: "vit_large", 1280: "vit_huge"}


class EncoderOutput(NamedTuple):
    """Normalised tokens.

    Attributes:
        prefix: (B, R, D), tokens that stand for no patch, such as the class token; R is 0 without any.
        patches: (B, K, D), the patch tokens in the order they were given.
        grid: patches along each axis of the images they come from.
        blocks: only when asked for: what each block was given, and what the last one gave with the final norm's scale
            and shift; depth + 1 times (B, R + K, D).
    """

    prefix: Tensor
    patches: Tensor
    grid: tuple[int, ...]
    blocks: tuple[Tensor, ...] = ()


class Encoder(nn.Module, ABC):
    """What a model asks of an encoder: `forward(images, ids_keep=None) -> EncoderOutput`, and what stands here.

    `forward` encodes all of the images (B, C, *size), or what a mask's `ids_keep` names. Where a decoder
    `reads_blocks`, it is called with `keep_blocks=True` too, which an encoder that `gives_blocks` takes.

    Attributes:
        input_size: pixels along each axis of the images it is made for.
        in_chans: channels.
        grid: what a mask chooses from, along each axis: the patches.
        patch_size: pixels of a patch along each axis; empty for an encoder without patches.
        embed_dim: width of a token.
        num_prefix_tokens: tokens that stand for no patch.
        has_class_token: the first of them is a class token.
        gives_blocks: `EncoderOutput.blocks` can be asked for.
        strategies: how its input can be masked, by name.
        arguments: that make an encoder of the same shape, without its drop_path; "encoder" names a kind other than vit.
            Empty: fine-tuning cannot make one.
        embedding: the name of the layer that reads pixels.
        head_name: the name of a classifier's linear layer.
        label: what it is, in words.
        blocks: whose activations can be saved and which are compiled and sharded one by one; none in some encoders.
    """

    input_size: tuple[int, ...]
    in_chans: int
    grid: tuple[int, ...]
    patch_size: tuple[int, ...]
    embed_dim: int
    num_prefix_tokens: int = 0
    has_class_token: bool = False
    gives_blocks: bool = False
    strategies: Mapping[str, Strategy] = STRATEGIES
    arguments: Mapping[str, Any] = {}
    embedding: str = ""
    head_name: str = "head"
    label: str = "network"
    blocks: nn.ModuleList

    def grid_of(self, images: Tensor) -> tuple[int, ...]:
        """The grid of images (B, C, *size), which may be larger or smaller than those it is made for.

        Raises:
            ConfigError: another number of channels or axes, or a size that the patch does not divide.
        """
        if images.ndim != len(self.patch_size) + 2 or images.shape[1] != self.in_chans:
            raise ConfigError(
                f"images have shape {tuple(images.shape)}",
                f"this model takes (batch, {self.in_chans}, {', '.join(['size'] * len(self.patch_size))})",
            )
        return grid_size(images.shape[2:], self.patch_size)

    @abstractmethod
    def flops(self, kept: int) -> tuple[int, int]:
        """Operations of embedding `kept` patches of an image, and of all that follows."""

    def layer_of(self, name: str) -> int:
        """The layer of a parameter, for learning rates: 0 for the embedding, then the blocks, then the rest."""
        raise ConfigError(f"this model is a {self.label} without layers of {name}", "fine-tune another")

    def timm_model(self) -> tuple[str, dict[str, Any]]:
        """A name that timm has, and the arguments that make that model this one, whose state_dict it loads.

        Its features are the mean of the normalised patch tokens, as `encode` gives them; a classifier's norm stands
        behind the pooling.

        Raises:
            ConfigError: timm has no such model.
        """
        raise ConfigError(f"this model is a {self.label}, which timm does not have", "use --to safetensors or onnx")

    @property
    def num_patches(self) -> int:
        """L, the patches of an image of the size trained on."""
        return prod(self.grid)


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
        self.proj = CONVOLUTIONS[len(size)](in_chans, embed_dim, size, size)
        nn.init.xavier_uniform_(self.proj.weight.data.view(embed_dim, -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, K, P), channels last within a patch, to (B, K, D)."""
        weight = self.proj.weight.movedim(1, -1).flatten(1)
        return F.linear(patches, weight, self.proj.bias)


class ViTEncoder(Encoder):
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
        registers: learned tokens between the class token and the patches, which take part in attention and are not
            features (Darcet et al. 2024, "Vision transformers need registers"); timm's `reg_tokens`.
        drop_path: stochastic depth rate of the last block, rising linearly from 0.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    pos_embed: Tensor
    gives_blocks = True
    embedding = "patch_embed.proj"
    label = "vision transformer"

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
        registers: int = 0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        within("drop_path", drop_path, 0, 1, open_high=True)
        self.grid = grid_size(input_size, patch_size)
        self.input_size = tuple(input_size)
        self.patch_size = tuple(patch_size)
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.has_class_token = class_token
        self.arguments = {
            "input_size": self.input_size,
            "patch_size": self.patch_size,
            "in_chans": in_chans,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "class_token": class_token,
            **({"registers": registers} if registers else {}),
        }
        self.num_prefix_tokens = class_token + registers
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim).normal_(std=0.02)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, registers, embed_dim).normal_(std=0.02)) if registers else None
        self.register_buffer("pos_embed", sincos(embed_dim, self.grid, self.num_prefix_tokens)[None])
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, drop_path * i / max(depth - 1, 1)) for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.apply(init_linear)
        self.patch_embed = PatchEmbed(self.patch_size, in_chans, embed_dim)

    def forward(self, images: Tensor, ids_keep: Tensor | None = None, *, keep_blocks: bool = False) -> EncoderOutput:
        """Encodes all patches of the images, or those named.

        Args:
            images: (B, C, *size) float; a size other than the one trained on has its positions resampled.
            ids_keep: (B, K) int64 patch indices; None: all.
            keep_blocks: give the tokens between blocks too.
        """
        grid = self.grid_of(images)
        patches = patchify(images, self.patch_size)
        if ids_keep is not None:
            patches = gather(patches, ids_keep)
        x = self.patch_embed(patches)
        positions = self.positions(grid)
        patch_positions = positions[self.num_prefix_tokens :]
        x = x + (patch_positions if ids_keep is None else F.embedding(ids_keep, patch_positions))
        tokens: list[Tensor] = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if tokens:
            prefix = (torch.cat(tokens, dim=1) + positions[: self.num_prefix_tokens]).to(x.dtype)
            x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
        between = []
        for block in self.blocks:
            if keep_blocks:
                between.append(x)
            x = block(x)
        if keep_blocks:  # the final norm learns by its scale and shift alone; who mixes blocks normalises the mixture
            between.append(x * self.norm.weight + self.norm.bias)
        prefix, patches = self.norm(x).tensor_split((self.num_prefix_tokens,), dim=1)
        return EncoderOutput(prefix, patches, grid, tuple(between))

    def positions(self, grid: tuple[int, ...]) -> Tensor:
        """(num_prefix + L, D), resampled where `grid` is not the one trained on."""
        return resample(self.pos_embed[0], self.grid, grid)

    def layer_of(self, name: str) -> int:
        """As `Encoder.layer_of`."""
        if name.startswith(("cls_token", "patch_embed.")):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else len(self.blocks) + 1

    def timm_model(self) -> tuple[str, dict[str, Any]]:
        """As `Encoder.timm_model`."""
        base = _TIMM.get(self.embed_dim, "vit_base")
        arguments = {"img_size" if name == "input_size" else name: value for name, value in self.arguments.items()}
        if registers := arguments.pop("registers", 0):
            arguments["reg_tokens"] = registers
        arguments["fc_norm"] = isinstance(self.norm, nn.Identity)
        return f"{base}_patch{14 if base == 'vit_huge' else 16}_224", arguments

    def flops(self, kept: int) -> tuple[int, int]:
        """Operations of embedding `kept` patches of an image, and of the blocks."""
        embed = 2 * kept * prod(self.patch_size) * self.in_chans * self.embed_dim
        return embed, blocks_flops(self.blocks, kept + self.num_prefix_tokens)
