from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from torchmae.errors import ConfigError
from torchmae.nn.encoder import PatchEmbed, ViTEncoder
from torchmae.nn.patches import gather, patchify
from torchmae.nn.positions import resample


def tiny(**overrides: Any) -> ViTEncoder:
    values: dict[str, Any] = {
        "input_size": (8, 12),
        "patch_size": (4, 2),
        "in_chans": 2,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 4,
    }
    return ViTEncoder(**(values | overrides)).eval()


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_patch_embedding_is_a_convolution(axes: int) -> None:
    size, patch = (6, 8, 4)[:axes], (3, 4, 2)[:axes]
    embed = PatchEmbed(patch, 5, 7)
    torch.nn.init.normal_(embed.proj.bias)
    images = torch.randn(2, 5, *size)
    torch.testing.assert_close(
        embed(patchify(images, patch)), embed.proj(images).flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("class_token", [True, False])
def test_a_subset_is_the_gathered_tokens_alone(class_token: bool) -> None:
    encoder = tiny(class_token=class_token)
    images = torch.randn(3, 2, 8, 12)
    ids = torch.rand(3, 12).argsort(1)[:, :5]
    out = encoder(images, ids)
    assert out.prefix.shape == (3, int(class_token), 16)
    assert out.patches.shape == (3, 5, 16)

    x = F.conv2d(images, encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias, stride=(4, 2))
    x = x.flatten(2).transpose(1, 2) + encoder.pos_embed[:, int(class_token) :]
    x = gather(x, ids)
    if class_token:
        x = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).expand(3, -1, -1), x], dim=1)
    for block in encoder.blocks:
        x = block(x)
    torch.testing.assert_close(torch.cat([out.prefix, out.patches], dim=1), encoder.norm(x), rtol=1e-5, atol=1e-5)


def test_all_patches_named_in_order_is_no_subset() -> None:
    encoder = tiny()
    images = torch.randn(2, 2, 8, 12)
    named = encoder(images, torch.arange(12).expand(2, -1))
    whole = encoder(images)
    torch.testing.assert_close(named.patches, whole.patches)
    torch.testing.assert_close(named.prefix, whole.prefix)


def test_tokens_come_in_the_order_they_are_asked_for() -> None:
    encoder = tiny()
    images = torch.randn(2, 2, 8, 12)
    ids = torch.rand(2, 12).argsort(1)
    torch.testing.assert_close(encoder(images, ids).patches, gather(encoder(images).patches, ids), rtol=1e-5, atol=1e-5)


def test_another_image_size_resamples_the_positions() -> None:
    encoder = tiny()
    other = tiny(input_size=(16, 16))
    state = encoder.state_dict()
    state["pos_embed"] = resample(state["pos_embed"][0], (2, 6), (4, 8))[None]
    other.load_state_dict(state)
    images = torch.randn(2, 2, 16, 16)
    torch.testing.assert_close(encoder(images).patches, other(images).patches)
    ids = torch.tensor([[31, 0], [5, 17]])
    torch.testing.assert_close(encoder(images, ids).patches, other(images, ids).patches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_type_stays_that_type_on_any_size(dtype: torch.dtype) -> None:
    encoder = tiny().to(dtype)
    for size in ((8, 12), (12, 8)):
        out = encoder(torch.randn(2, 2, *size, dtype=dtype))
        assert out.patches.dtype == out.prefix.dtype == dtype
        assert out.patches.isfinite().all()


@pytest.mark.parametrize(
    ("size", "patch", "channels", "length"),
    [((64,), (8,), 1, 8), ((4, 8, 6), (2, 4, 3), 5, 8), ((6, 10), (3, 5), 4, 4)],
)
def test_signals_volumes_and_oblong_images(
    size: tuple[int, ...], patch: tuple[int, ...], channels: int, length: int
) -> None:
    encoder = tiny(input_size=size, patch_size=patch, in_chans=channels, embed_dim=24)
    assert encoder.num_patches == length
    out = encoder(torch.randn(2, channels, *size))
    assert out.patches.shape == (2, length, 24)
    assert out.prefix.shape == (2, 1, 24)
    double = encoder(torch.randn(2, channels, *(2 * s for s in size)))
    assert double.patches.shape == (2, length * 2 ** len(size), 24)


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (2, 2, 8), (2, 8, 12), (2, 2, 8, 12, 1)])
def test_images_of_another_kind_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"images have shape .*takes \(batch, 2, size, size\)"):
        tiny()(torch.zeros(shape))


def test_an_indivisible_image_is_an_error() -> None:
    with pytest.raises(ConfigError, match="does not divide input size 9x12"):
        tiny()(torch.zeros(1, 2, 9, 12))


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2.0, float("nan")])
def test_a_drop_path_rate_outside_its_range_is_an_error(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"drop_path is .*\[0, 1\)"):
        tiny(drop_path=rate)


def test_drop_path_rises_linearly_and_acts_in_training_only() -> None:
    encoder = tiny(depth=5, drop_path=0.4)
    assert [block.drop_path.rate for block in encoder.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    images = torch.randn(8, 2, 8, 12)
    assert torch.equal(encoder(images).patches, encoder(images).patches)
    encoder.train()
    assert not torch.equal(encoder(images).patches, encoder(images).patches)


def test_initial_weights() -> None:
    encoder = ViTEncoder(input_size=(32, 32), patch_size=(8, 8), in_chans=3, embed_dim=192, depth=2, num_heads=3)
    linears = [m for m in encoder.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 8
    fans = [(m.weight, m.in_features + m.out_features) for m in linears]
    fans.append((encoder.patch_embed.proj.weight, 192 + 3 * 64))  # as if it were a linear layer
    for weight, fan in fans:
        bound = math.sqrt(6 / fan)
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
    assert encoder.cls_token is not None
    assert encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.25)
    assert "pos_embed" not in dict(encoder.named_parameters())
    assert "pos_embed" in encoder.state_dict()
