from __future__ import annotations

import pytest
import torch

from torchmae.evaluation.inpainting import _neighbour_mean, interpolate

SIZES = [(40,), (24, 18), (8, 9, 10), (7, 5), (2, 32), (16, 1, 5)]


def hole(size: tuple[int, ...], count: int = 2, share: float = 0.75) -> torch.Tensor:
    """Random pixels, (count, 1, *size)."""
    return torch.rand(count, 1, *size, generator=torch.Generator().manual_seed(0)) < share


@pytest.mark.parametrize("size", SIZES)
def test_visible_pixels_stay(size: tuple[int, ...]) -> None:
    images, removed = torch.randn(2, 3, *size), hole(size)
    filled = interpolate(images, removed)
    seen = ~removed.expand_as(images)
    assert filled.shape == images.shape
    assert torch.equal(filled[seen], images[seen])


@pytest.mark.parametrize("size", SIZES)
def test_hidden_pixels_are_not_looked_at(size: tuple[int, ...]) -> None:
    images, removed = torch.randn(2, 3, *size), hole(size)
    other = torch.where(removed, torch.randn_like(images) * 100, images)
    torch.testing.assert_close(interpolate(images, removed), interpolate(other, removed))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_constant_image_comes_back(size: tuple[int, ...], share: float) -> None:
    images = torch.full((2, 2, *size), 0.7)
    torch.testing.assert_close(interpolate(images, hole(size, share=share)), images)


@pytest.mark.parametrize("size", SIZES)
def test_values_stay_within_those_visible(size: tuple[int, ...]) -> None:
    images, removed = torch.rand(2, 1, *size), hole(size)
    filled = interpolate(images, removed)
    for image, gone, result in zip(images, removed, filled, strict=True):
        assert result.min() >= image[~gone].min() - 1e-6
        assert result.max() <= image[~gone].max() + 1e-6


def test_a_ramp_is_nearly_exact_inside() -> None:
    ramp = torch.linspace(0, 1, 32)[None, None, :, None] + torch.linspace(0, 2, 32)
    removed = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    removed[..., 12:20, 10:18] = True
    error = (interpolate(ramp, removed) - ramp).abs().max()
    assert error < 0.02  # of a range of 3: the mean of what is visible is off by 0.7
    signal = torch.linspace(0, 1, 64)[None, None]
    gone = torch.zeros(1, 1, 64, dtype=torch.bool)
    gone[..., 30:34] = True
    torch.testing.assert_close(interpolate(signal, gone), signal, atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [(40,), (24, 18), (8, 9, 10)])
def test_hidden_pixels_are_near_the_mean_of_their_neighbours(size: tuple[int, ...]) -> None:
    images, removed = torch.randn(2, 3, *size), hole(size, share=0.5)
    filled = interpolate(images, removed)
    gone = removed.expand_as(images)
    residual = (filled - _neighbour_mean(filled))[gone].abs().max()
    assert residual < 0.02
    assert (images - _neighbour_mean(images))[gone].abs().max() > 1


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_neighbour_mean(axes: int) -> None:
    image = torch.zeros(1, 1, *(5,) * axes)
    middle = (0, 0, *(2,) * axes)
    image[middle] = 1.0
    mean = _neighbour_mean(image)
    assert mean[middle] == 0
    assert mean.sum() == pytest.approx(1)
    for axis in range(axes):
        for step in (-1, 1):
            beside = list(middle)
            beside[2 + axis] += step
            assert mean[tuple(beside)] == pytest.approx(1 / (2 * axes))
    corner = torch.zeros(1, 1, *(3,) * axes)
    corner[(0, 0, *(0,) * axes)] = 1.0
    assert _neighbour_mean(corner)[(0, 0, *(0,) * axes)] == pytest.approx(
        0.5
    )  # at a border a pixel stands in for what is not there


def test_each_channel_has_its_own_hole() -> None:
    images = torch.randn(2, 3, 12, 12)
    removed = torch.rand(2, 3, 12, 12) < 0.6
    together = interpolate(images, removed)
    for channel in range(3):
        alone = interpolate(images[:, channel : channel + 1], removed[:, channel : channel + 1])
        torch.testing.assert_close(together[:, channel : channel + 1], alone)


def test_a_channel_with_nothing_visible_is_zero() -> None:
    images = torch.randn(1, 2, 6, 6)
    removed = torch.zeros(1, 2, 6, 6, dtype=torch.bool)
    removed[:, 1] = True
    filled = interpolate(images, removed)
    assert torch.equal(filled[:, 0], images[:, 0])
    assert torch.equal(filled[:, 1], torch.zeros(1, 6, 6))
