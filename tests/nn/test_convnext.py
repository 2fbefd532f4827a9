"""ConvNeXt V2: timm's model without a mask, dense masked convolutions with one, and what masked pixels cannot do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchmae.errors import ConfigError
from torchmae.nn.convnext import ConvNeXtClassifier, ConvNeXtEncoder
from torchmae.presets import build

TINY: dict[str, Any] = {
    "input_size": (32, 48),
    "patch_size": (16, 16),
    "in_chans": 2,
    "depths": (1, 2, 1),
    "dims": (4, 6, 8),
}
TIMM = {**TINY, "input_size": (32, 64), "patch_size": (32, 32), "depths": (1, 1, 2, 1), "dims": (4, 6, 8, 10)}


def shaken(model: torch.nn.Module) -> Any:
    with torch.no_grad():  # response norms too, which begin as zeros
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def masks(batch: int, length: int, keep: int) -> Tensor:
    return torch.rand(batch, length).argsort(1)[:, :keep]


@pytest.mark.parametrize("classes", [0, 5])
def test_without_a_mask_it_is_timm_s(classes: int) -> None:
    timm = pytest.importorskip("timm")
    ours = shaken(ConvNeXtClassifier(classes, **TIMM) if classes else ConvNeXtEncoder(**TIMM))
    name, arguments = ours.timm_model()
    theirs = timm.create_model(name, num_classes=classes, **arguments).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 2, 32, 64)
    if classes:
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
    else:
        patches = ours(images).patches
        torch.testing.assert_close(patches, theirs.forward_features(images).flatten(2).mT, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(patches.mean(1), theirs(images), rtol=1e-5, atol=1e-5)


def test_the_preset_is_convnextv2_atto() -> None:
    timm = pytest.importorskip("timm")
    ours = shaken(build("convnext_atto", decoder_embed_dim=16).encoder)
    theirs = timm.create_model("convnextv2_atto", num_classes=0).eval()
    weights = {name.replace("norm_pre.", "head.norm."): value for name, value in ours.state_dict().items()}
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}  # 1x1 convolutions for linear layers
    theirs.load_state_dict({name: value.view(shapes[name]) for name, value in weights.items()}, strict=True)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found, wanted = ours(images), theirs.forward_features(images)
        normed = theirs.head.norm(wanted).flatten(2).mT  # timm's norm stands behind the pooling
    assert found.grid == (2, 3)
    torch.testing.assert_close(found.patches, normed, rtol=1e-4, atol=1e-4)


def dense(encoder: ConvNeXtEncoder, images: Tensor, ids: Tensor) -> Tensor:
    """FCMAE as the paper has it: dense convolutions, and features times the mask around each."""
    grid = encoder.grid_of(images)
    flags = torch.zeros(len(images), encoder.num_patches).scatter(1, ids, 1.0).view(-1, 1, *grid)

    def masked(x: Tensor) -> Tensor:
        return x * F.interpolate(flags, size=x.shape[2:], mode="nearest")

    def each(layer: torch.nn.Module, x: Tensor) -> Tensor:
        return layer(x.movedim(1, -1)).movedim(-1, 1)

    x = masked(each(encoder.stem[1], encoder.stem[0](masked(images))))
    for stage in encoder.stages:
        if len(stage.downsample):
            x = masked(stage.downsample[1](masked(each(stage.downsample[0], x))))
        for block in stage.blocks:
            hidden = masked(F.gelu(each(block.mlp.fc1, each(block.norm, block.conv_dw(x)))))
            norms = hidden.norm(dim=(2, 3), keepdim=True)
            scaled = hidden * norms / (norms.mean(1, keepdim=True) + 1e-6)
            grn = block.mlp.grn
            hidden = hidden + grn.bias.view(1, -1, 1, 1) + grn.weight.view(1, -1, 1, 1) * scaled
            x = masked(x + each(block.mlp.fc2, hidden))
    tokens = encoder.norm_pre(x.flatten(2).mT)
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


def test_with_a_mask_it_is_dense_convolutions_times_the_mask() -> None:
    encoder = shaken(ConvNeXtEncoder(**TINY))
    images, ids = torch.randn(3, 2, 32, 48), masks(3, 6, 3)
    torch.testing.assert_close(encoder(images, ids).patches, dense(encoder, images, ids), rtol=1e-5, atol=1e-5)
    every = torch.arange(6).expand(3, -1)
    torch.testing.assert_close(encoder(images, every).patches, encoder(images).patches, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"input_size": (48,), "patch_size": (8,)}, {"input_size": (8, 8, 16), "patch_size": (4, 4, 8)}]
)
def test_signals_and_volumes(changes: dict[str, Any]) -> None:
    encoder = shaken(ConvNeXtEncoder(**{**TINY, **changes}))
    images = torch.randn(2, 2, *encoder.input_size)
    ids = torch.arange(encoder.num_patches).flip(0).expand(2, -1)
    torch.testing.assert_close(encoder(images, ids).patches.flip(1), encoder(images).patches, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"depths": (1, 2)}, "give both one number for each stage"),
        ({"depths": (1, 0, 1)}, "give both one number for each stage"),
        ({"patch_size": (2, 2)}, "use multiples of 4, or fewer stages"),
        ({"input_size": (32, 40)}, "does not divide input size 32x40"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ConvNeXtEncoder(**{**TINY, **changes})


@pytest.mark.parametrize("changes", [{}, {"patch_size": (64, 64), "input_size": (64, 64)}, {"mlp_ratio": 2.0}])
def test_what_timm_does_not_have(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="use --to safetensors or onnx"):
        ConvNeXtEncoder(**{**(TIMM if changes else TINY), **changes}).timm_model()


def test_a_decoder_that_reads_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="feature_weights does not apply to the 'convnext' encoder"):
        build("convnext_32", decoder="cross", feature_weights=True)
