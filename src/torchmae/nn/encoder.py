"""Encoders turn the visible patches of images into tokens. The vision transformer's state_dict is timm's."""

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
    """Normalised tokens."""

    prefix: Tensor  # (B, R, D), the tokens that stand for no patch, such as the class token; R may be 0
    patches: Tensor  # (B, K, D), the patch tokens in the order of `ids_keep`
    grid: tuple[int, ...]  # patches along each axis of the images
    # With `keep_blocks`: each block's input, then the last block's output times the final norm's scale plus its shift;
    # depth + 1 times (B, R + K, D).
    blocks: tuple[Tensor, ...] = ()


class Encoder(nn.Module, ABC):
    """The interface of an encoder: `forward(images, ids_keep=None) -> EncoderOutput`, and these attributes.

    `forward` encodes images (B, C, *size): all patches, or those that `ids_keep` (B, K) names. A decoder that
    `reads_blocks` needs an encoder that `gives_blocks`; the model then passes `keep_blocks=True`.

    Attributes:
        input_size: pixels along each axis of the images it is made for.
        in_chans: channels.
        grid: patches along each axis, from which a mask chooses.
        patch_size: pixels of a patch along each axis; empty for an encoder without patches.
        embed_dim: width of a token.
        num_prefix_tokens: tokens before the patches, such as the class token and registers.
        has_class_token: the first prefix token is a class token.
        gives_blocks: `forward` takes `keep_blocks`.
        strategies: the mask strategies for its input, by name; empty: it cannot be masked.
        arguments: keyword arguments that make an encoder of the same shape, without drop_path; "encoder" is a name in
            ENCODERS ("vit" if it is left out). Empty: fine-tuning is not possible.
        embedding: the name of the layer that reads pixels.
        head_name: the name of a classifier's linear layer.
        label: the kind of network, in words.
        blocks: layers that are checkpointed, compiled and sharded one by one; some encoders have none.
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
        """The grid of images (B, C, *size); ConfigError for other channels or axes, or where patches do not fit."""
        if images.ndim != len(self.patch_size) + 2 or images.shape[1] != self.in_chans:
            raise ConfigError(
                f"images have shape {tuple(images.shape)}",
                f"this model takes (batch, {self.in_chans}, {', '.join(['size'] * len(self.patch_size))})",
            )
        return grid_size(images.shape[2:], self.patch_size)

    @abstractmethod
    def flops(self, kept: int) -> tuple[int, int]:
        """Operations for one image: embedding `kept` patches, and everything after it."""

    def layer_of(self, name: str) -> int:
        """The layer number of a parameter, for layer-wise learning rates: embedding 0, then blocks, then the rest."""
        raise ConfigError(f"this model is a {self.label} without layers of {name}", "fine-tune another")

    def timm_model(self) -> tuple[str, dict[str, Any]]:
        """The timm model that loads this state_dict: its name and its arguments; ConfigError: timm has none.

        Its features are the mean of the normalised patch tokens. In a classifier the norm follows the pooling.
        """
        raise ConfigError(f"this model is a {self.label}, which timm does not have", "use --to safetensors or onnx")

    def at_blocks(self, images: Tensor, blocks: Sequence[int], ids_keep: Tensor | None = None) -> EncoderOutput:
        """The outputs of some blocks, by number, concatenated along D; see `MaskedAutoencoder.encode`."""
        output = self(images, ids_keep, keep_blocks=True)
        depth, final = len(self.blocks), torch.cat([output.prefix, output.patches], dim=1)
        found = [
            final if number == depth - 1 else F.layer_norm(output.blocks[number + 1], final.shape[-1:])
            for number in blocks
        ]
        prefix, patches = torch.cat(found, dim=-1).tensor_split((self.num_prefix_tokens,), dim=1)
        return EncoderOutput(prefix, patches, output.grid)

    @property
    def num_patches(self) -> int:
        """L, the number of patches of an image of `input_size`."""
        return prod(self.grid)


class PatchEmbed(nn.Module):
    """Patches to tokens. The weight has the shape of timm's convolution; it is applied as a linear layer."""

    def __init__(self, patch_size: Sequence[int], in_chans: int, embed_dim: int) -> None:
        super().__init__()
        size = tuple(patch_size)
        self.proj = CONVOLUTIONS[len(size)](in_chans, embed_dim, size, size)
        nn.init.xavier_uniform_(self.proj.weight.data.view(embed_dim, -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (B, K, P), channels last within a patch, to tokens (B, K, D)."""
        weight = self.proj.weight.movedim(1, -1).flatten(1)
        return F.linear(patches, weight, self.proj.bias)


class ViTEncoder(Encoder):
    """A vision transformer (Dosovitskiy et al. 2021) that encodes any subset of an image's patches.

    Sizes have 1, 2 or 3 axes; `patch_size` divides `input_size` and `num_heads` divides `embed_dim`, else ConfigError.
    `registers` is the number of learned tokens between the class token and the patches, which take part in attention
    and are no features (Darcet et al. 2024, timm's `reg_tokens`). `drop_path`, in [0, 1), is the stochastic depth rate
    of the last block; it rises linearly from 0 at the first.
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
        """Encodes images (B, C, *size): the patches at indices `ids_keep`, (B, K) int64; None: all.

        Positions are resampled for sizes other than `input_size`. `keep_blocks` fills `EncoderOutput.blocks`.
        """
        grid = self.grid_of(images)
        patches = patchify(images, self.patch_size)
        if ids_keep is not None:
            patches = gather(patches, ids_keep)
        x = self.patch_embed(patches)
        positions = resample(self.pos_embed[0], self.grid, grid)  # (num_prefix + L, D)
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
        if keep_blocks:  # scale and shift, so that the final norm has a gradient; the decoder normalises its mixture
            between.append(x * self.norm.weight + self.norm.bias)
        prefix, patches = self.norm(x).tensor_split((self.num_prefix_tokens,), dim=1)
        return EncoderOutput(prefix, patches, grid, tuple(between))

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
        """As `Encoder.flops`."""
        embed = 2 * kept * prod(self.patch_size) * self.in_chans * self.embed_dim
        return embed, blocks_flops(self.blocks, kept + self.num_prefix_tokens)
