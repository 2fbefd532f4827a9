from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from torchmae.errors import ConfigError
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.presets import PRESETS, arguments, build, construct


def size_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("preset", "timm_name", "millions"),
    [
        ("vit_tiny", "vit_tiny_patch16_224", 5.5),
        ("vit_small", "vit_small_patch16_224", 21.7),
        ("vit_base", "vit_base_patch16_224", 85.8),
        ("vit_large", "vit_large_patch16_224", 303.3),
        ("vit_huge", "vit_huge_patch14_224", 630.8),
    ],
)
def test_encoders_have_timms_size(preset: str, timm_name: str, millions: float) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        ours = build(preset)
        theirs = timm.create_model(timm_name, num_classes=0)
    assert {name: p.shape for name, p in ours.encoder.state_dict().items()} == {
        name: p.shape for name, p in theirs.state_dict().items()
    }
    positions = theirs.pos_embed.numel()  # parameters there, fixed here
    assert size_of(ours.encoder) == size_of(theirs) - positions
    assert size_of(theirs) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("preset", ["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"])
def test_decoders_are_the_paper_s(preset: str) -> None:
    values = arguments(preset)
    assert (values["decoder"], values["decoder_embed_dim"], values["decoder_depth"]) == ("self", 512, 8)
    assert values["decoder_num_heads"] == 16
    assert values["norm_pix"] is True
    assert values["patch_size"] == ((14, 14) if preset == "vit_huge" else (16, 16))


@pytest.mark.parametrize(
    ("preset", "length", "patch_values"),
    [("vit_tiny_32_p4", 64, 48), ("vit_tiny_32_p2", 256, 12), ("vit_digits", 16, 4), ("vit_huge", 256, 588)],
)
def test_patches_of_a_preset(preset: str, length: int, patch_values: int) -> None:
    with torch.device("meta"):
        model = build(preset)
    assert isinstance(model, MaskedAutoencoder)
    assert model.encoder.num_patches == length
    assert model.decoder.pred.out_features == patch_values


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_full_set_of_arguments(preset: str) -> None:
    with torch.device("meta"):
        model = construct(arguments(preset))
    assert model.encoder.input_size == PRESETS[preset]["input_size"]


def test_the_small_ones_run() -> None:
    for preset in ("vit_digits", "mlp"):
        model = build(preset)
        strategy = "elements" if preset == "mlp" else "random"
        shape = (1, 8, 8) if preset == "vit_digits" else (3, 32, 32)
        mask = Masker(model.encoder, strategy, 0.75).from_noise(
            torch.rand(2, Masker(model.encoder, strategy).noise_count)
        )
        assert model(torch.randn(2, *shape), mask).loss.isfinite()


def test_overrides_replace_and_none_keeps() -> None:
    values = arguments("vit_small", in_chans=5, input_size=(96, 160), depth=None, norm_pix=False)
    assert values == {
        **PRESETS["vit_small"],
        "in_chans": 5,
        "input_size": (96, 160),
        "norm_pix": False,
    }
    with torch.device("meta"):
        model = build("vit_small", in_chans=5, input_size=(96, 160))
    assert model.encoder.grid == (6, 10)
    assert model.encoder.patch_embed.proj.weight.shape == (384, 5, 16, 16)


def test_presets_are_not_changed_by_use() -> None:
    before = {name: dict(values) for name, values in PRESETS.items()}
    values = arguments("vit_digits", depth=1)
    values["depth"] = 99
    assert before == PRESETS


@pytest.mark.parametrize(
    ("given", "input_size", "patch_size"),
    [
        ({}, (224, 224), (16, 16)),
        ({"input_size": 96}, (96, 96), (16, 16)),
        ({"patch_size": 8}, (224, 224), (8, 8)),
        ({"patch_size": (8, 4)}, (224, 224), (8, 4)),
        ({"input_size": [64, 32], "patch_size": 8}, (64, 32), (8, 8)),
        ({"input_size": (8, 32, 32), "patch_size": 4}, (8, 32, 32), (4, 4, 4)),
        ({"input_size": 32, "patch_size": (2, 4, 4)}, (32, 32, 32), (2, 4, 4)),
        ({"input_size": (32, 32, 32)}, (32, 32, 32), (16, 16, 16)),
        ({"input_size": (1024,)}, (1024,), (16,)),
        ({"input_size": 64, "patch_size": 4}, (64, 64), (4, 4)),
    ],
)
def test_one_number_means_every_axis(
    given: dict[str, Any], input_size: tuple[int, ...], patch_size: tuple[int, ...]
) -> None:
    values = arguments("vit_tiny", **given)
    assert values["input_size"] == input_size
    assert values["patch_size"] == patch_size


def test_a_volume_by_override() -> None:
    model = build("vit_digits", input_size=(4, 8, 8), patch_size=2, in_chans=2)
    mask = Masker(model.encoder, "random", 0.75).from_noise(torch.rand(1, 32))
    out = model(torch.randn(1, 2, 4, 8, 8), mask)
    assert out.pred.shape == (1, 24, 2 * math.prod((2, 2, 2)))


@pytest.mark.parametrize(
    ("preset", "given", "told"),
    [
        ("vit_bas", {}, "model.preset is 'vit_bas'; did you mean 'vit_base'"),
        ("vit_base", {"hidden_dim": 3}, "model.hidden_dim does not apply to preset 'vit_base'; leave it out"),
        ("mlp", {"patch_size": 4}, "model.patch_size does not apply to preset 'mlp'"),
        ("mlp", {"norm_pix": False}, "model.norm_pix does not apply to preset 'mlp'"),
        ("vit_base", {"input_size": (64, 64), "patch_size": (4, 4, 4)}, "give both the same 1, 2 or 3 numbers"),
        ("vit_base", {"input_size": 100}, "does not divide input size 100x100"),
        ("vit_base", {"depth": 0}, "model.depth is 0; it must be 1 or more"),
        ("vit_base", {"in_chans": -1}, "model.in_chans is -1; it must be 1 or more"),
        ("vit_base", {"patch_size": 0}, "it must be 1 or more"),
        ("vit_base", {"mlp_ratio": 0.0}, "larger mlp_ratio"),
        ("vit_base", {"num_heads": 7}, "width 768 cannot be divided among 7 heads"),
        ("vit_base", {"decoder": "none"}, "decoder is 'none'"),
        ("vit_base", {"drop_path": 1.0}, "drop_path is 1"),
    ],
)
def test_arguments_that_cannot_work(preset: str, given: dict[str, Any], told: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError) as caught:
        build(preset, **given)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
