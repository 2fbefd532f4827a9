from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torchmae import presets
from torchmae.errors import ConfigError
from torchmae.evaluation.feature_maps import (
    attention_weights,
    class_attention,
    content_tokens,
    embed_2d,
    patch_colours,
)
from torchmae.nn.layers import Attention
from torchmae.nn.mae import MaskedAutoencoder


def tiny(**overrides: object) -> MaskedAutoencoder:
    small = {"embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1}
    model = presets.construct(presets.arguments("vit_digits", **{**small, **overrides})).eval()
    assert isinstance(model, MaskedAutoencoder)
    return model


def test_colours_follow_the_principal_components() -> None:
    # Three orthogonal directions of very different variance: red, green and blue must be these, in that order.
    scores = torch.randn(2, 100, 3)
    directions = torch.linalg.qr(torch.randn(8, 3)).Q.T
    tokens = scores * torch.tensor([9.0, 3.0, 1.0]) @ directions
    colours = patch_colours(tokens)
    assert colours.shape == (2, 100, 3)
    assert colours.min() == 0 and colours.max() == 1
    for channel in range(3):
        correlation = np.corrcoef(colours[..., channel].ravel(), scores[..., channel].ravel())[0, 1]
        assert abs(correlation) > 0.95


def test_colours_do_not_depend_on_the_order_of_patches() -> None:
    tokens = torch.randn(3, 20, 6)
    order = torch.randperm(20)
    np.testing.assert_allclose(patch_colours(tokens[:, order]), patch_colours(tokens)[:, order], atol=1e-5)


@pytest.mark.parametrize("direction", [(0.8, -0.6), (-0.8, 0.6), (0.6, -0.8)])
def test_a_component_points_where_its_largest_weight_is_positive(direction: tuple[float, float]) -> None:
    line = torch.linspace(-1, 1, 30)
    red = patch_colours((line[:, None] * torch.tensor(direction))[None])[0, :, 0]
    rising = red[-1] > red[0]
    assert rising == (max(direction, key=abs) > 0)


def test_one_odd_patch_does_not_grey_the_rest() -> None:
    tokens = torch.randn(4, 50, 4)
    tokens[0, 0] *= 1000
    colours = patch_colours(tokens)[..., 1].ravel()
    assert np.ptp(colours[1:]) > 0.9


@pytest.mark.parametrize("shape", [(1, 2, 5), (2, 4, 1), (1, 3, 2)])
def test_components_that_do_not_exist_are_grey(shape: tuple[int, int, int]) -> None:
    colours = patch_colours(torch.randn(shape))
    assert colours.shape == (*shape[:2], 3)
    assert (colours[..., -1] == 0.5).all()
    assert np.ptp(colours[..., 0]) == 1


def test_patches_that_are_all_alike_are_grey() -> None:
    assert (patch_colours(torch.full((2, 8, 4), 3.3)) == 0.5).all()


def test_content_leaves_out_what_place_alone_says() -> None:
    model = tiny()
    image = torch.full((1, 1, 8, 8), 0.7)
    assert model.encode(image, "tokens").std(1).max() > 0.1
    # A uniform image looks the same wherever it is shifted to: only place tells its patches apart.
    assert content_tokens(model, image).abs().max() < 1e-5


def test_content_follows_the_patches_when_an_image_is_shifted() -> None:
    # All 16 places of the grid are averaged over, so a shift by whole patches takes the same mean away.
    model = tiny()
    images = torch.randn(1, 1, 8, 8)
    shifted = images.roll((2, 4), (2, 3))
    away = model.encode(images, "tokens") - content_tokens(model, images)
    torch.testing.assert_close(model.encode(shifted, "tokens") - content_tokens(model, shifted), away)


def test_attention_weights_are_those_of_the_fused_attention() -> None:
    attention = Attention(12, 3)
    x = torch.randn(2, 7, 12)
    weights = attention_weights(attention, x)
    assert weights.shape == (2, 3, 7, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7))
    values = attention.qkv(x).view(2, 7, 3, 3, 4)[:, :, 2].transpose(1, 2)
    out = attention.proj((weights @ values).transpose(1, 2).reshape(2, 7, 12))
    torch.testing.assert_close(out, attention(x))


def test_class_attention_is_a_share_and_leaves_no_hook_behind() -> None:
    model = tiny()
    attention = class_attention(model, torch.randn(3, 1, 8, 8))
    assert attention.shape == (3, 2, 16)
    assert (attention > 0).all() and (attention.sum(-1) < 1).all()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_class_token_attends_to_the_patch_it_was_taught_to() -> None:
    model = tiny(depth=1, num_heads=1)
    attention = model.encoder.blocks[0].attn
    with torch.no_grad():
        # Keys are the tokens, and every query is the key of patch 5 of this very image, large.
        images = torch.randn(1, 1, 8, 8)
        seen: list[torch.Tensor] = []
        hook = attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model.encoder(images)
        hook.remove()
        attention.qkv.weight.zero_()
        attention.qkv.weight[16:32] = torch.eye(16)
        attention.qkv.bias[:16] = 100 * seen[0][0, 6]  # after the class token
    assert class_attention(model, images)[0, 0].argmax() == 5


def test_attention_needs_a_class_token_and_patches() -> None:
    with pytest.raises(ConfigError, match="no class token .*class_token true"):
        class_attention(tiny(class_token=False), torch.zeros(1, 1, 8, 8))
    mlp = presets.construct(presets.arguments("mlp"))
    for look in (class_attention, content_tokens):
        with pytest.raises(ConfigError, match="this model has no patches"):
            look(mlp, torch.zeros(1, 3, 32, 32))


def clusters() -> tuple[torch.Tensor, torch.Tensor]:
    centres = 5 * torch.randn(3, 20)
    labels = torch.arange(60) % 3
    return centres[labels] + torch.randn(60, 20), labels


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_map_keeps_clusters_together(method: str) -> None:
    features, labels = clusters()
    points = embed_2d(features, method)
    assert points.shape == (60, 2)
    centres = np.stack([points[labels == label].mean(0) for label in range(3)])
    nearest_centre = np.linalg.norm(points[:, None] - centres, axis=-1).argmin(1)
    assert (nearest_centre == labels.numpy()).mean() > 0.95
    assert (embed_2d(features, method) == points).all()


def test_a_map_by_pca_ignores_the_length_of_features() -> None:
    features, _ = clusters()
    centred = features - features.mean(0)
    first, second = (embed_2d(F.normalize(centred), "pca"), embed_2d(features, "pca"))
    # Of the same directions; centring the unit vectors again moves them a little.
    assert abs(np.corrcoef(first[:, 0], second[:, 0])[0, 1]) > 0.99


@pytest.mark.parametrize("shape", [(3, 2), (5, 1)])
@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_the_smallest_maps(shape: tuple[int, int], method: str) -> None:
    points = embed_2d(torch.randn(shape), method)
    assert points.shape == (shape[0], 2) and np.isfinite(points).all()


def test_maps_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="map of 2 images"):
        embed_2d(torch.randn(2, 4))
    with pytest.raises(ConfigError, match="method is 'tsn'; did you mean 'tsne'"):
        embed_2d(torch.randn(9, 4), "tsn")
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ConfigError, match="pip install umap-learn"):
        embed_2d(torch.randn(9, 4), "umap")
