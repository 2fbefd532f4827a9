"""Masked autoencoders of other libraries, wired as their documentation shows. Each gives the loss of a batch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmae.errors import ConfigError
from torchmae.nn.layers import LAYER_NORM_EPS
from torchmae.nn.patches import gather, patch_statistics, patchify
from torchmae.nn.positions import sincos


@dataclass(frozen=True)
class PeerSizes:
    """A masked autoencoder of square images, with the paper's decoder; torchmae's names.

    Attributes:
        input_size: pixels along each side.
        patch_size: likewise.
        in_chans: channels.
        embed_dim: encoder width.
        depth: encoder blocks.
        num_heads: encoder heads.
        mlp_ratio: hidden width of every MLP over its width.
        decoder_embed_dim: decoder width.
        decoder_depth: decoder blocks.
        decoder_num_heads: decoder heads.
        norm_pix: the target is each patch normalised by its own mean and deviation.
        mask_ratio: share of the patches that is removed.
    """

    input_size: int
    patch_size: int
    in_chans: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int
    norm_pix: bool
    mask_ratio: float


class TransformersMAE(nn.Module):
    """transformers' `ViTMAEForPreTraining`.

    https://huggingface.co/docs/transformers/model_doc/vit_mae

    Args:
        sizes: of the network.
    """

    def __init__(self, sizes: PeerSizes) -> None:
        super().__init__()
        transformers = _import("transformers", "transformers")
        self.model = transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(
                image_size=sizes.input_size,
                patch_size=sizes.patch_size,
                num_channels=sizes.in_chans,
                hidden_size=sizes.embed_dim,
                num_hidden_layers=sizes.depth,
                num_attention_heads=sizes.num_heads,
                intermediate_size=int(sizes.embed_dim * sizes.mlp_ratio),
                decoder_hidden_size=sizes.decoder_embed_dim,
                decoder_num_hidden_layers=sizes.decoder_depth,
                decoder_num_attention_heads=sizes.decoder_num_heads,
                decoder_intermediate_size=int(sizes.decoder_embed_dim * sizes.mlp_ratio),
                layer_norm_eps=LAYER_NORM_EPS,
                mask_ratio=sizes.mask_ratio,
                norm_pix_loss=sizes.norm_pix,
                attn_implementation="sdpa",
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        """The loss of (B, C, size, size) images under a new random mask."""
        loss: Tensor = self.model(images).loss
        return loss


class LightlyMAE(nn.Module):
    """The parts of lightly, whose blocks are timm's, put together as in its example.

    https://docs.lightly.ai/self-supervised-learning/examples/mae.html

    Args:
        sizes: of the network.
    """

    def __init__(self, sizes: PeerSizes) -> None:
        super().__init__()
        modules = _import("lightly.models.modules", "lightly")
        self._utils: Any = _import("lightly.models.utils", "lightly")
        self._sizes = sizes
        vit = _timm_encoder(sizes)
        self.encoder = modules.MaskedVisionTransformerTIMM(vit=vit)
        self.encoder.mask_token = None  # of other methods; here it would be a parameter without a gradient
        self.decoder_embed = nn.Linear(sizes.embed_dim, sizes.decoder_embed_dim)
        self.decoder = modules.MaskedVisionTransformerDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            embed_dim=sizes.decoder_embed_dim,
            depth=sizes.decoder_depth,
            num_heads=sizes.decoder_num_heads,
            mlp_ratio=sizes.mlp_ratio,
        )
        self.decoder_pred = nn.Linear(sizes.decoder_embed_dim, sizes.patch_size**2 * sizes.in_chans)

    def forward(self, images: Tensor) -> Tensor:
        """The loss of (B, C, size, size) images under a new random mask."""
        utils = self._utils
        shape = (len(images), self.encoder.sequence_length)
        keep, hidden = utils.random_token_mask(shape, mask_ratio=self._sizes.mask_ratio, device=images.device)
        visible = self.decoder_embed(self.encoder.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, shape).to(visible.dtype)
        decoded = self.decoder(utils.set_at_index(tokens, keep, visible))
        pred = self.decoder_pred(utils.get_at_index(decoded, hidden))
        # The class token has index 0 and no patch.
        target = utils.get_at_index(utils.patchify(images, self._sizes.patch_size), hidden - 1)
        if self._sizes.norm_pix:
            target = utils.normalize_mean_var(target)
        return F.mse_loss(pred.float(), target)


class TimmMAE(nn.Module):
    """timm, which has no masked autoencoder: its `VisionTransformer` and its blocks, put together as the paper says.

    Visible tokens are encoded, shuffled mask tokens are put back in place (paper section 3), all patches are
    predicted, and the loss counts the hidden ones.

    https://huggingface.co/docs/timm/reference/models

    Args:
        sizes: of the network.
    """

    def __init__(self, sizes: PeerSizes) -> None:
        super().__init__()
        timm = _import("timm.models.vision_transformer", "timm")
        self._sizes = sizes
        self.vit = _timm_encoder(sizes)
        self.embed = nn.Linear(sizes.embed_dim, sizes.decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, sizes.decoder_embed_dim))
        block = partial(timm.Block, sizes.decoder_embed_dim, sizes.decoder_num_heads, sizes.mlp_ratio, qkv_bias=True)
        norm = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
        self.decoder = nn.Sequential(*(block(norm_layer=norm) for _ in range(sizes.decoder_depth)))
        self.norm = norm(sizes.decoder_embed_dim)
        self.pred = nn.Linear(sizes.decoder_embed_dim, sizes.patch_size**2 * sizes.in_chans)
        side = sizes.input_size // sizes.patch_size
        positions = (sincos(width, (side, side), 1)[None] for width in (sizes.embed_dim, sizes.decoder_embed_dim))
        self.vit.pos_embed, self.decoder_pos = (nn.Parameter(item, requires_grad=False) for item in positions)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """The loss of (B, C, size, size) images under a random mask, new or from (B, L) uniform random numbers."""
        vit, count = self.vit, len(images)
        patches = vit.patch_embed(images) + vit.pos_embed[:, 1:]
        length = patches.shape[1]
        num_visible = int(length * (1 - self._sizes.mask_ratio))
        order = (torch.rand(count, length, device=images.device) if noise is None else noise).argsort(1)
        keep, hidden = order[:, :num_visible], order[:, num_visible:]
        first = (vit.cls_token + vit.pos_embed[:, :1]).expand(count, -1, -1)
        visible = self.embed(vit.norm(vit.blocks(torch.cat([first, gather(patches, keep)], 1))))
        shuffled = torch.cat([visible[:, 1:], self.mask_token.expand(count, length - num_visible, -1)], 1)
        tokens = torch.cat([visible[:, :1], gather(shuffled, order.argsort(1))], 1) + self.decoder_pos
        pred = self.pred(self.norm(self.decoder(tokens)))[:, 1:].float()
        target = patchify(images, (self._sizes.patch_size,) * 2)
        if self._sizes.norm_pix:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        is_hidden = torch.zeros(count, length, device=images.device).scatter_(1, hidden, 1.0)
        return ((pred - target).square().mean(-1) * is_hidden).sum() / is_hidden.sum()


def _timm_encoder(sizes: PeerSizes) -> Any:
    return _import("timm.models.vision_transformer", "timm").VisionTransformer(
        img_size=sizes.input_size,
        patch_size=sizes.patch_size,
        in_chans=sizes.in_chans,
        embed_dim=sizes.embed_dim,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        mlp_ratio=sizes.mlp_ratio,
        num_classes=0,
    )


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{package} is not installed", "pip install 'torchmae[bench]'") from error


PEERS: dict[str, Callable[[PeerSizes], nn.Module]] = {
    "transformers": TransformersMAE,
    "timm": TimmMAE,
    "lightly": LightlyMAE,
}
