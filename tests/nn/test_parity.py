"""The same weights through other people's code: transformers' ViT-MAE and timm's VisionTransformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torchmae.nn.encoder import ViTEncoder
from torchmae.nn.masking import random_mask
from torchmae.nn.patches import gather
from torchmae.nn.positions import sincos
from torchmae.presets import compose

timm_vit = pytest.importorskip("timm.models.vision_transformer")
transformers = pytest.importorskip("transformers")

BLOCK = {
    "layernorm_before": "norm1",
    "attention.o_proj": "attn.proj",
    "layernorm_after": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
REST = {
    "vit.embeddings.cls_token": "encoder.cls_token",
    "vit.embeddings.position_embeddings": "encoder.pos_embed",
    "vit.embeddings.patch_embeddings.projection.weight": "encoder.patch_embed.proj.weight",
    "vit.embeddings.patch_embeddings.projection.bias": "encoder.patch_embed.proj.bias",
    "vit.layernorm.weight": "encoder.norm.weight",
    "vit.layernorm.bias": "encoder.norm.bias",
    "decoder.mask_token": "decoder.mask_token",
    "decoder.decoder_embed.weight": "decoder.embed.weight",
    "decoder.decoder_embed.bias": "decoder.embed.bias",
    "decoder.decoder_norm.weight": "decoder.norm.weight",
    "decoder.decoder_norm.bias": "decoder.norm.bias",
    "decoder.decoder_pred.weight": "decoder.pred.weight",
    "decoder.decoder_pred.bias": "decoder.pred.bias",
}


def in_their_names(ours: dict[str, Tensor], depth: int, decoder_depth: int) -> dict[str, Tensor]:
    """Our parameters (or their gradients) under transformers' names; positions only where they are given."""
    theirs = {name: ours[our_name] for name, our_name in REST.items() if our_name in ours}
    for part, their_part, count in (
        ("encoder", "vit.layers", depth),
        ("decoder", "decoder.decoder_layers", decoder_depth),
    ):
        for i in range(count):
            for kind in ("weight", "bias"):
                for name, our_name in BLOCK.items():
                    theirs[f"{their_part}.{i}.{name}.{kind}"] = ours[f"{part}.blocks.{i}.{our_name}.{kind}"]
                for name, value in zip("qkv", ours[f"{part}.blocks.{i}.attn.qkv.{kind}"].chunk(3), strict=True):
                    theirs[f"{their_part}.{i}.attention.{name}_proj.{kind}"] = value
    if "decoder.pos_embed" in ours:  # theirs has a row of zeros for the class token
        theirs["decoder.decoder_pos_embed"] = torch.nn.functional.pad(ours["decoder.pos_embed"], (0, 0, 1, 0))
    return theirs


def shaken(model: torch.nn.Module) -> None:
    """Moves every parameter off its initial value, so that zero biases and unit norms hide no difference."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


CASES = {
    "shallow": {
        "size": 32,
        "patch": 8,
        "chans": 3,
        "dim": 32,
        "depth": 2,
        "heads": 4,
        "dec": (16, 1, 2),
        "ratio": 0.75,
    },
    "deep": {"size": 48, "patch": 4, "chans": 5, "dim": 48, "depth": 6, "heads": 3, "dec": (32, 3, 4), "ratio": 0.75},
    "half": {"size": 24, "patch": 4, "chans": 1, "dim": 64, "depth": 3, "heads": 8, "dec": (64, 2, 8), "ratio": 0.5},
}


@pytest.mark.parametrize("norm_pix", [False, True], ids=["raw", "norm_pix"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_predictions_and_gradients_equal_transformers(case: dict[str, Any], norm_pix: bool) -> None:
    width, decoder_depth, decoder_heads = case["dec"]
    ours = compose(
        input_size=(case["size"],) * 2,
        patch_size=(case["patch"],) * 2,
        in_chans=case["chans"],
        embed_dim=case["dim"],
        depth=case["depth"],
        num_heads=case["heads"],
        decoder_embed_dim=width,
        decoder_depth=decoder_depth,
        decoder_num_heads=decoder_heads,
        norm_pix=norm_pix,
    )
    shaken(ours)
    theirs = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            image_size=case["size"],
            patch_size=case["patch"],
            num_channels=case["chans"],
            hidden_size=case["dim"],
            num_hidden_layers=case["depth"],
            num_attention_heads=case["heads"],
            intermediate_size=4 * case["dim"],
            decoder_hidden_size=width,
            decoder_num_hidden_layers=decoder_depth,
            decoder_num_attention_heads=decoder_heads,
            decoder_intermediate_size=4 * width,
            layer_norm_eps=1e-6,
            mask_ratio=case["ratio"],
            norm_pix_loss=norm_pix,
        )
    )
    theirs.load_state_dict(in_their_names(ours.state_dict(), case["depth"], decoder_depth), strict=True)

    images = torch.randn(3, case["chans"], case["size"], case["size"]) * 0.7 + 0.2
    noise = torch.rand(3, ours.encoder.num_patches)
    mask = random_mask(noise, ours.encoder.grid, case["ratio"])
    our_output = ours(images, mask)
    their_output = theirs(images, noise=noise)

    assert torch.equal(their_output.mask.bool(), mask.removed())
    assert our_output.loss.dtype == torch.float32
    assert our_output.loss.item() == pytest.approx(their_output.loss.item(), abs=1e-5)
    torch.testing.assert_close(our_output.pred, gather(their_output.logits, mask.ids_masked), rtol=0, atol=1e-4)

    our_output.loss.backward()
    their_output.loss.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(ours.parameters()))
    their_gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for name, gradient in in_their_names(gradients, case["depth"], decoder_depth).items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (7, 2)])
def test_positions_equal_those_of_the_released_weights(height: int, width: int) -> None:
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

    table = build_2d_sinusoidal_position_embedding(height, width, embed_dim=32, cls_token=True)
    # Theirs is height first; they swap the halves, as here, to fit the released weights.
    torch.testing.assert_close(sincos(32, (height, width), num_prefix=1), table.roll(16, dims=1))


@pytest.mark.parametrize(("class_token", "registers"), [(True, 0), (False, 0), (True, 4), (False, 2)])
@pytest.mark.parametrize(("size", "patch", "chans"), [((224, 224), (16, 16), 3), ((24, 40), (4, 8), 2)])
def test_the_encoder_is_timms(
    class_token: bool, registers: int, size: tuple[int, int], patch: tuple[int, int], chans: int
) -> None:
    ours = ViTEncoder(
        input_size=size,
        patch_size=patch,
        in_chans=chans,
        embed_dim=192,
        depth=12,
        num_heads=3,
        class_token=class_token,
        registers=registers,
    )
    shaken(ours)
    theirs = timm_vit.VisionTransformer(
        img_size=size,
        patch_size=patch,
        in_chans=chans,
        embed_dim=192,
        depth=12,
        num_heads=3,
        class_token=class_token,
        reg_tokens=registers,
        global_pool="",
        num_classes=0,
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, chans, *size)
    with torch.no_grad():
        out = ours.eval()(images)
        wanted = theirs.eval().forward_features(images)
    torch.testing.assert_close(torch.cat([out.prefix, out.patches], dim=1), wanted, rtol=1e-5, atol=1e-5)


def test_a_timm_model_of_the_same_ratio_takes_the_weights() -> None:
    ours = ViTEncoder(
        input_size=(8, 8), patch_size=(4, 4), in_chans=3, embed_dim=10, depth=1, num_heads=2, mlp_ratio=2.67
    )
    theirs = timm_vit.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=10, depth=1, num_heads=2, mlp_ratio=2.67, global_pool="", num_classes=0
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
