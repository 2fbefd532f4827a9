from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from torchmae.errors import ConfigError
from torchmae.nn.gradients import BINS, oriented_gradients
from torchmae.nn.masking import Masker
from torchmae.presets import build


def ramp(angle: float, size: tuple[int, int] = (16, 24), contrast: float = 1.0) -> torch.Tensor:
    """An image that rises towards `angle`, in radians from the horizontal: (1, 1, H, W)."""
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return (contrast * (x * math.cos(angle) + y * math.sin(angle)))[None, None]


def inner(histograms: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Those of patches away from the border, where pixels are repeated: (N, BINS)."""
    return histograms.view(*grid, -1)[1:-1, 1:-1].flatten(0, 1)


@pytest.mark.parametrize("index", range(BINS))
def test_a_ramp_has_one_direction(index: int) -> None:
    found = inner(oriented_gradients(ramp(index * math.pi / BINS, contrast=10), (4, 4)), (4, 6))
    expected = torch.zeros(BINS)
    expected[index] = math.sqrt(BINS)
    assert torch.allclose(found, expected.expand_as(found), atol=0.05)


def test_between_two_directions_both_get_half() -> None:
    found = inner(oriented_gradients(ramp(2.5 * math.pi / BINS), (4, 4)), (4, 6))
    assert torch.allclose(found[:, 2], found[:, 3], atol=1e-3)
    assert (found[:, [0, 1, 4, 5, 6, 7, 8]].abs() < 1e-3).all()


def test_contrast_and_brightness_do_not_matter_flatness_does() -> None:
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 50
    histograms = oriented_gradients(image, (4, 4))
    assert histograms.shape == (2, 4, 3 * BINS)
    assert torch.allclose(oriented_gradients(image * 3 + 7, (4, 4)), histograms, atol=0.02)
    assert torch.allclose(oriented_gradients(-image, (4, 4)), histograms, atol=1e-4)  # half a turn: the sign is lost
    assert (oriented_gradients(torch.full((1, 3, 8, 8), 0.5), (4, 4)) == 0).all()
    per_channel = histograms.view(2, 4, 3, BINS).square().mean(-1)
    assert (per_channel <= 1).all()
    assert (per_channel > 0.95).all()


def test_it_is_scikit_images_but_for_its_border_and_binning() -> None:
    feature = pytest.importorskip("skimage.feature")
    generator = np.random.default_rng(0)
    coarse = torch.from_numpy(generator.random((1, 1, 6, 6), dtype=np.float32))
    image = torch.nn.functional.interpolate(coarse, size=(48, 48), mode="bicubic") * 100
    theirs = feature.hog(image[0, 0].numpy(), BINS, (8, 8), (1, 1), feature_vector=False, block_norm="L2")[:, :, 0, 0]
    ours = oriented_gradients(image, (8, 8)).view(6, 6, BINS)
    a = torch.nn.functional.normalize(ours[1:-1, 1:-1].flatten(0, 1), dim=1)
    b = torch.nn.functional.normalize(torch.from_numpy(theirs.copy()).float()[1:-1, 1:-1].flatten(0, 1), dim=1)
    # theirs gives all of a vote to the bin it falls in: agreement is high, not full, and lost with another order
    straight = (a * b).sum(1).mean()
    assert straight > 0.75
    assert max((a * b.roll(shift, 1)).sum(1).mean() for shift in range(2, BINS - 1)) < straight - 0.2


def test_a_second_loss_in_training_only() -> None:
    torch.manual_seed(0)
    model = build("vit_digits", depth=1, hog_weight=2.0)
    images = torch.randn(4, 1, 8, 8)
    mask = Masker(model.encoder, "random", 0.75).from_noise(torch.rand(4, 16))
    plain = model.eval()(images, mask)
    both = model.train()(images, mask)
    assert torch.equal(plain.pred, both.pred)
    assert both.loss > plain.loss + 0.1
    both.loss.backward()
    assert model.hog_head.weight.grad.abs().max() > 0


def test_only_of_pictures() -> None:
    with pytest.raises(ConfigError, match="2 axes"):
        build("vit_digits", input_size=(16,), patch_size=(4,), hog_weight=1.0)
    with pytest.raises(ConfigError, match="hog_weight"):
        build("vit_digits", hog_weight=-1.0)
