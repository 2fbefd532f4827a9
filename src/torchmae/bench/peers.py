"""Other libraries' masked autoencoders, which give the loss of (B, C, size, size) images, and timm's blocks in ours.

`sizes` are those of `contenders.peer_sizes`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from torchmae.errors import ConfigError
from torchmae.nn.layers import LAYER_NORM_EPS, Block


class TransformersMAE(nn.Module):
    """transformers' `ViTMAEForPreTraining`: https://huggingface.co/docs/transformers/model_doc/vit_mae."""

    def __init__(self, sizes: SimpleNamespace) -> None:
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
        """The loss under a new random mask."""
        loss: Tensor = self.model(images).loss
        return loss


class LightlyMAE(nn.Module):
    """The parts of lightly, whose blocks are timm's, put together as in its example.

    https://docs.lightly.ai/self-supervised-learning/examples/mae.html
    """

    def __init__(self, sizes: SimpleNamespace) -> None:
        super().__init__()
        modules = _import("lightly.models.modules", "lightly")
        self._utils: Any = _import("lightly.models.utils", "lightly")
        self._sizes = sizes
        vit = _import("timm.models.vision_transformer", "timm").VisionTransformer(
            img_size=sizes.input_size,
            patch_size=sizes.patch_size,
            in_chans=sizes.in_chans,
            embed_dim=sizes.embed_dim,
            depth=sizes.depth,
            num_heads=sizes.num_heads,
            mlp_ratio=sizes.mlp_ratio,
            num_classes=0,
        )
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
        """The loss under a new random mask."""
        utils = self._utils
        shape = (len(images), self.encoder.sequence_length)
        keep, masked = utils.random_token_mask(shape, mask_ratio=self._sizes.mask_ratio, device=images.device)
        visible = self.decoder_embed(self.encoder.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, shape).to(visible.dtype)
        decoded = self.decoder(utils.set_at_index(tokens, keep, visible))
        pred = self.decoder_pred(utils.get_at_index(decoded, masked))
        # The class token has index 0 and no patch.
        target = utils.get_at_index(utils.patchify(images, self._sizes.patch_size), masked - 1)
        if self._sizes.norm_pix:
            target = utils.normalize_mean_var(target)
        return F.mse_loss(pred.float(), target)


def use_timm_blocks(model: nn.Module, mlp_ratio: float) -> None:
    """Puts timm's blocks in the places of a network's own, of the same sizes."""
    block = partial(
        _import("timm.models.vision_transformer", "timm").Block,
        mlp_ratio=mlp_ratio,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=LAYER_NORM_EPS),
    )
    for parent in list(model.modules()):
        for name, ours in parent.named_children():
            if isinstance(ours, Block):
                heads, drop_path = ours.attn.num_heads, ours.drop_path.rate
                setattr(parent, name, block(ours.attn.proj.in_features, heads, drop_path=drop_path))


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{package} is not installed", "pip install 'torchmae[bench]'") from error


PEERS: dict[str, Callable[[SimpleNamespace], nn.Module]] = {"transformers": TransformersMAE, "lightly": LightlyMAE}
