"""Which patches are hidden. Pure functions of given random numbers; every sample of a batch loses the same count.

`True` in a boolean mask always means removed; indices are patch indices in row-major order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from torchmae.errors import ConfigError
from torchmae.nn.patches import patchify


class Mask(NamedTuple):
    """A partition of the L patches of every sample.

    Attributes:
        ids_keep: (B, K) int64, the patches the encoder sees.
        ids_masked: (B, L - K) int64, the patches to predict.
    """

    ids_keep: Tensor
    ids_masked: Tensor

    def removed(self) -> Tensor:
        """(B, L) bool, True where a patch is removed."""
        batch, kept = self.ids_keep.shape
        length = kept + self.ids_masked.shape[1]
        flags = torch.zeros(batch, length, dtype=torch.bool, device=self.ids_keep.device)
        return flags.scatter_(1, self.ids_masked, True)

    def to(self, device: torch.device | str) -> Mask:
        """The same mask on another device."""
        return Mask(self.ids_keep.to(device), self.ids_masked.to(device))


def num_keep(length: int, ratio: float) -> int:
    """K = clamp(round(L (1 - r)), 1, L - 1): at least one patch is kept and at least one hidden.

    Raises:
        ConfigError: a ratio outside (0, 1), or fewer than two patches.
    """
    _check_ratio(ratio)
    if length < 2:
        raise ConfigError(f"the image has {length} patches", "masking needs at least 2: use a smaller patch")
    return min(max(round(length * (1 - ratio)), 1), length - 1)


def random_mask(noise: Tensor, grid: Sequence[int], ratio: float) -> Mask:
    """Hides patches at random, without regard to place (paper section 3, "Masking").

    Args:
        noise: (B, L) uniform random numbers; the K patches with the smallest are kept.
        grid: patches along each axis, L in all.
        ratio: share that is removed, in (0, 1).
    """
    return _keep_smallest(noise, num_keep(prod(grid), ratio))


def block_mask(noise: Tensor, grid: Sequence[int], ratio: float) -> Mask:
    """Hides one contiguous block (paper, figure 6, "block"), of random centre and proportions.

    Patches are hidden in order of their distance from the centre, so the count is exact and the block is connected;
    the middle of an image is hidden more often than its corners, and at ratios above about 0.6 its very middle always.

    Args:
        noise: (B, 2n) uniform random numbers for n axes: centre, then proportions.
        grid: patches along each axis.
        ratio: share that is removed, in (0, 1).
    """
    keep = num_keep(prod(grid), ratio)
    sizes = torch.tensor(grid, device=noise.device, dtype=torch.float32)
    centre = noise[:, : len(grid)] * sizes - 0.5  # (B, n)
    stretch = torch.exp2(noise[:, len(grid) :] * 2 - 1) / sizes  # (B, n): one side up to 4 times another's
    offset = (_coordinates(grid, noise.device) - centre[:, None, :]).abs() * stretch[:, None, :]  # (B, L, n)
    # The small second term puts corners last in each ring, which keeps the block connected.
    distance = offset.amax(-1) + 1e-3 * offset.sum(-1)
    return _keep_smallest(-distance, keep)


def grid_mask(noise: Tensor, grid: Sequence[int], ratio: float) -> Mask:
    """Keeps patches that are evenly spread (paper, figure 6, "grid"); at ratio 0.75 in 2-D, one of every 2 x 2.

    Patches are kept in the order of a recursive checkerboard, shifted at random; any ratio gives an exact count.

    Args:
        noise: (B, n) uniform random numbers: the shift along each axis.
        grid: patches along each axis.
        ratio: share that is removed, in (0, 1).
    """
    keep = num_keep(prod(grid), ratio)
    sizes = torch.tensor(grid, device=noise.device)
    shift = (noise * sizes).long()  # (B, n)
    place = (_coordinates(grid, noise.device).long() + shift[:, None, :]) % sizes  # (B, L, n)
    rank = torch.zeros(place.shape[:2], dtype=torch.int64, device=noise.device)
    for level in range(max(max(grid) - 1, 1).bit_length()):
        bit = (place >> level) & 1
        digit = bit.sum(-1) % 2  # of the cells of a level, diagonal neighbours come before adjacent ones
        rank = rank * 2 + digit
        for axis in range(len(grid) - 1):
            rank = rank * 2 + bit[..., axis]
    return _keep_smallest(rank, keep)


def elements_mask(noise: Tensor, ratio: float, *, inverted: bool = False) -> Tensor:
    """Hides single values, each on its own with the same probability.

    Args:
        noise: (B, N) uniform random numbers, one for each value of a flattened image.
        ratio: the probability, in (0, 1).
        inverted: hide with probability 1 - ratio instead: the tutorial's mask, which multiplies the input by
            `noise < ratio` and so keeps what it means to hide.

    Returns:
        (B, N) bool, True where a value is removed. The counts differ from sample to sample.

    Raises:
        ConfigError: a ratio outside (0, 1).
    """
    _check_ratio(ratio)
    return noise >= ratio if inverted else noise < ratio


def mask_from_tokens(removed: Tensor) -> Mask:
    """A mask from flags.

    Args:
        removed: (B, L) or (L,) bool, True where a patch is removed.

    Raises:
        ConfigError: samples that lose different counts, or a sample that loses nothing or everything.
    """
    flags = (removed if removed.ndim == 2 else removed[None]).bool()
    counts = flags.sum(1)
    lost = int(counts[0])
    if not bool((counts == lost).all()):
        raise ConfigError(
            f"the samples' masks remove {int(counts.min())} to {int(counts.max())} patches",
            "remove the same number from every sample of a batch",
        )
    if lost in (0, flags.shape[1]):
        raise ConfigError(
            f"the mask removes {lost} of {flags.shape[1]} patches", "leave at least one patch and hide at least one"
        )
    return _keep_smallest(flags.long(), flags.shape[1] - lost)


def mask_from_pixels(removed: Tensor, patch_size: Sequence[int]) -> Mask:
    """A mask from a hole in the image: a patch is removed when any of its pixels is.

    Args:
        removed: (B, *size) or (*size) bool, True where a pixel is removed.
        patch_size: pixels along each axis.

    Raises:
        ConfigError: as `mask_from_tokens`, and a size that the patch does not divide.
    """
    flags = removed if removed.ndim == len(patch_size) + 1 else removed[None]
    return mask_from_tokens(patchify(flags[:, None], patch_size).any(-1))


def spread(ids: Tensor, share: float) -> Tensor:
    """Every so-manieth of the indices: (B, M) to (B, max(1, round(M * share))).

    Strategies order what they hide: at random, by distance, by the grid. Evenly spread, a part is one of the whole.
    """
    count = max(1, round(ids.shape[1] * share))
    steps = torch.arange(count, device=ids.device) * ids.shape[1] // count
    return ids[:, steps]


STRATEGIES: dict[str, Callable[[Tensor, Sequence[int], float], Mask]] = {
    "random": random_mask,
    "block": block_mask,
    "grid": grid_mask,
}


def noise_count(strategy: str, grid: Sequence[int]) -> int:
    """How many random numbers a strategy takes for each sample."""
    return {"random": prod(grid), "block": 2 * len(grid), "grid": len(grid)}[strategy]


def _check_ratio(ratio: float) -> None:
    if not 0 < ratio < 1:
        raise ConfigError(f"mask ratio is {ratio:g}", "it must lie between 0 and 1, both excluded; the paper uses 0.75")


def _coordinates(grid: Sequence[int], device: torch.device) -> Tensor:
    """(L, n) float32, the place of each patch in the grid."""
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(grid))


def _keep_smallest(order: Tensor, keep: int) -> Mask:
    ids = order.argsort(dim=1, stable=True)
    return Mask(ids[:, :keep].contiguous(), ids[:, keep:].contiguous())
