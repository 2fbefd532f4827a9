from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchmae import presets
from torchmae.errors import ConfigError
from torchmae.nn.flops import count_flops
from torchmae.nn.masking import Masker

MODELS = [
    ("vit_digits", {}, 0.75),
    ("vit_digits", {"decoder": "cross"}, 0.5),
    ("vit_digits", {"class_token": False, "mlp_ratio": 2.7, "in_chans": 3}, 0.9),
    ("vit_digits", {"input_size": (8, 8, 4), "patch_size": (2, 4, 2)}, 0.75),
    ("vit_tiny_32_p4", {"depth": 2, "embed_dim": 96}, 0.6),
    ("mlp", {"hidden_dim": 7}, 0.5),
]
GROUPED = [
    ("convnext_32", {"depths": (1, 2, 1, 1), "dims": (4, 8, 8, 12)}, 0.6),
    ("convnext_32", {"depths": (1, 1), "dims": (4, 8), "input_size": (8, 8, 4), "patch_size": (4, 4, 2)}, 0.75),
]


def whole_image(values: dict[str, Any]) -> int:
    """By formula, of encoding one image of which nothing is masked."""
    encoder = presets.weightless(values).encoder
    return sum(encoder.flops(encoder.num_patches))


def counted(values: dict[str, Any], ratio: float) -> tuple[int, int, int]:
    """What PyTorch counts in a forward pass, in forward and backward, and in encoding, for two images."""
    model = presets.construct(values)
    images = torch.randn(2, values["in_chans"], *values["input_size"])
    strategy = "elements" if "hidden_dim" in values else "random"
    mask = Masker(model.encoder, strategy, ratio).from_noise(torch.rand(2, Masker(model.encoder, strategy).noise_count))
    # A fused backward computes the attention weights again; the formulas count what the gradients need.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(images, mask).loss
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        with FlopCounterMode(display=False) as encoding, torch.no_grad():
            model.encode(images)
    first, second, third = (item.get_total_flops() for item in (forward, backward, encoding))
    return first, first + second, third


@pytest.mark.parametrize(("preset", "overrides", "ratio"), MODELS)
def test_formulas_give_what_pytorch_counts(preset: str, overrides: dict[str, Any], ratio: float) -> None:
    values = presets.arguments(preset, **overrides)
    flops = count_flops(presets.weightless(values), ratio)
    assert (2 * flops.forward, 2 * flops.training, 2 * whole_image(values)) == counted(values, ratio)


@pytest.mark.parametrize(("preset", "overrides", "ratio"), GROUPED)
def test_formulas_of_depthwise_convolutions(preset: str, overrides: dict[str, Any], ratio: float) -> None:
    values = presets.arguments(preset, **overrides)
    forward, _, encoding = counted(values, ratio)  # backward, PyTorch counts all groups of a convolution as one
    assert (2 * count_flops(presets.weightless(values), ratio).forward, 2 * whole_image(values)) == (forward, encoding)


def test_a_model_that_everybody_knows() -> None:
    # ViT-B/16 at 224: 17.6 billion multiply-adds, patches and classifier with it.
    values = presets.arguments("vit_base")
    assert whole_image(values) / 2 == pytest.approx(17.5e9, rel=0.01)
    # The encoder of visible patches alone costs less than a third of the whole image's (paper, section 3).
    assert count_flops(presets.weightless(values), 0.75).encoder < whole_image(values) / 3.5


def test_recomputing_costs_one_more_pass_through_the_blocks() -> None:
    flops = count_flops(presets.weightless(presets.arguments("vit_large")), 0.75)
    assert flops.recomputed - flops.training == flops.forward - flops.patch_embed


def test_a_ratio_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="mask ratio is 1; it must lie between"):
        count_flops(presets.weightless(presets.arguments("vit_base")), 1.0)
