from __future__ import annotations

import pytest
import torch
from tiny_models import DECODER, ENCODER, mae

from torchmae.interop import names
from torchmae.nn.masking import random_mask

transformers = pytest.importorskip("transformers")


def test_the_released_layout_there_and_back() -> None:
    model = mae()
    official = names.to_official(model.state_dict())
    assert {"cls_token", "mask_token", "decoder_pos_embed", "decoder_embed.weight"} < set(official)
    assert {"blocks.1.attn.qkv.weight", "decoder_blocks.1.mlp.fc2.bias", "decoder_pred.bias"} < set(official)
    assert official["decoder_pos_embed"].shape == (1, 17, 24)
    assert not official["decoder_pos_embed"][:, 0].any()
    encoder, decoder = names.split_official(official)
    decoder["pos_embed"] = decoder["pos_embed"][:, 1:]
    model.encoder.load_state_dict(encoder)
    model.decoder.load_state_dict(decoder)
    assert len(encoder) + len(decoder) == len(official)


def test_transformers_there_and_back() -> None:
    official = names.to_official(mae().state_dict())
    theirs = names.to_huggingface(official, "vit.")
    assert "vit.encoder.layer.1.attention.attention.query.weight" in theirs
    assert "decoder.decoder_layers.0.attention.output.dense.bias" in theirs
    back = names.from_huggingface(theirs)
    assert set(back) == set(official)
    assert all(torch.equal(back[name], official[name]) for name in official)


def test_the_spelling_that_transformers_uses_itself() -> None:
    config = transformers.ViTMAEConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        decoder_hidden_size=24,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=96,
        layer_norm_eps=1e-6,
    )
    theirs = transformers.ViTMAEForPreTraining(config).eval()
    encoder, decoder = names.split_official(names.from_huggingface(theirs.state_dict()))
    decoder["pos_embed"] = decoder["pos_embed"][:, 1:]
    ours = mae(**ENCODER, **DECODER, norm_pix=False)
    ours.encoder.load_state_dict(encoder)
    ours.decoder.load_state_dict(decoder)
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    with torch.no_grad():
        expected = theirs(images, noise=noise).loss.item()
        assert ours(images, random_mask(noise, (4, 4), 0.75)).loss.item() == pytest.approx(expected, abs=1e-6)


def test_a_block_that_lacks_a_bias_that_others_have_is_not_joined() -> None:
    theirs = names.to_huggingface(names.to_official(mae().state_dict()), "vit.")
    del theirs["vit.encoder.layer.1.attention.attention.key.bias"]
    assert "blocks.1.attn.qkv.bias" not in names.from_huggingface(theirs)
    without = {
        name: value for name, value in theirs.items() if not name.endswith(("query.bias", "key.bias", "value.bias"))
    }
    back = names.from_huggingface(without)
    assert not any(back[f"{stack}blocks.{i}.attn.qkv.bias"].any() for stack in ("", "decoder_") for i in range(2))


def test_parameters_that_no_model_has_keep_their_names() -> None:
    odd = {"vit.encoder.layer.0.lambda_1.weight": torch.ones(1), "pooler.dense.weight": torch.ones(1)}
    assert set(names.from_huggingface(odd)) == {"blocks.0.lambda_1.weight", "pooler.dense.weight"}
