from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchmae.errors import ConfigError
from torchmae.nn.patches import gather, grid_size, patch_statistics, patchify, unpatchify

# Pairs of (patches along an axis, pixels of a patch along it), for one to three axes.
axes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3)


@given(axes, st.integers(1, 5), st.integers(1, 3))
def test_unpatchify_undoes_patchify(axes: list[tuple[int, int]], channels: int, batch: int) -> None:
    grid = [count for count, _ in axes]
    patch = [pixels for _, pixels in axes]
    size = [count * pixels for count, pixels in axes]
    images = torch.arange(batch * channels * int(np.prod(size))).reshape(batch, channels, *size)
    patches = patchify(images, patch)
    assert patches.shape == (batch, int(np.prod(grid)), channels * int(np.prod(patch)))
    assert torch.equal(unpatchify(patches, patch, grid), images)
    assert torch.equal(patchify(unpatchify(patches, patch, grid), patch), patches)


@pytest.mark.parametrize(
    ("size", "patch", "channels"),
    [((6,), (3,), 2), ((4, 6), (2, 3), 3), ((6, 4), (3, 2), 1), ((2, 4, 6), (1, 2, 3), 2)],
)
def test_patches_are_row_major_with_channels_last(size: tuple[int, ...], patch: tuple[int, ...], channels: int) -> None:
    images = torch.randn(2, channels, *size)
    patches = patchify(images, patch)
    for sample in range(2):
        for i, cell in enumerate(np.ndindex(*grid_size(size, patch))):
            values = []
            for pixel in np.ndindex(*patch):
                place = tuple(c * p + o for c, p, o in zip(cell, patch, pixel, strict=True))
                values += [images[(sample, channel, *place)] for channel in range(channels)]
            assert torch.equal(patches[sample, i], torch.stack(values))


@given(axes, st.data())
def test_an_indivisible_size_is_an_error_that_names_one_that_works(
    axes: list[tuple[int, int]], data: st.DataObject
) -> None:
    patch = [pixels + 1 for _, pixels in axes]
    size = [count * pixels for (count, _), pixels in zip(axes, patch, strict=True)]
    bad = data.draw(st.integers(0, len(axes) - 1))
    size[bad] += data.draw(st.integers(1, patch[bad] - 1))
    with pytest.raises(ConfigError) as caught:
        grid_size(size, patch)
    message = str(caught.value)
    assert "x".join(map(str, size)) in message
    assert "x".join(map(str, patch)) in message
    assert "\n" not in message
    named = re.search(r"such as (\d+) in place of (\d+)", message)
    assert named is not None
    assert int(named[2]) == size[bad]
    size[bad] = int(named[1])
    assert len(grid_size(size, patch)) == len(size)


@pytest.mark.parametrize(
    ("size", "patch", "told"),
    [
        ((32, 32), (4,), "2 dimensions and patch size 4 has 1"),
        ((8, 8, 8, 8), (2, 2, 2, 2), "1, 2 or 3 numbers"),
        ((), (), "1, 2 or 3 numbers"),
        ((32, 32), (4, 0), "patch size is 4x0; it must be 1 or more"),
        ((32, 32), (-4, 4), "patch size is -4x4; it must be 1 or more"),
        ((0, 32), (4, 4), "such as 4 in place of 0"),
        ((8, 8), (16, 8), "such as 16 in place of 8"),
    ],
)
def test_sizes_that_cannot_work(size: tuple[int, ...], patch: tuple[int, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        grid_size(size, patch)


def test_patchify_refuses_an_indivisible_image() -> None:
    with pytest.raises(ConfigError, match="patch size 4x4 does not divide input size 10x8"):
        patchify(torch.zeros(1, 3, 10, 8), (4, 4))


def test_gather_picks_by_sample() -> None:
    tokens = torch.randn(3, 5, 2)
    ids = torch.tensor([[4, 0], [1, 1], [2, 3]])
    picked = gather(tokens, ids)
    assert picked.shape == (3, 2, 2)
    for sample in range(3):
        for k in range(2):
            assert torch.equal(picked[sample, k], tokens[sample, ids[sample, k]])


def test_statistics_are_unbiased_and_joint_over_channels() -> None:
    images = torch.randn(2, 3, 4, 6) * 5 + torch.tensor([1.0, 10.0, -3.0])[:, None, None]
    patches = patchify(images, (2, 3))
    mean, std = patch_statistics(patches)
    values = patches.double().numpy()
    assert mean.shape == std.shape == (2, 4, 1)
    np.testing.assert_allclose(mean[..., 0], values.mean(-1), rtol=1e-5)
    np.testing.assert_allclose(std[..., 0], np.sqrt(values.var(-1, ddof=1) + 1e-6), rtol=1e-5)
    # One pixel of three channels: statistics over channels alone, never per channel.
    mean, std = patch_statistics(torch.tensor([[[0.0, 3.0, 6.0]]]))
    assert (mean.item(), std.item()) == pytest.approx((3.0, 3.0), rel=1e-6)


def test_a_flat_patch_has_a_deviation_of_a_thousandth() -> None:
    mean, std = patch_statistics(torch.full((1, 1, 12), 0.25))
    assert mean.item() == 0.25
    assert std.item() == pytest.approx(1e-3)
