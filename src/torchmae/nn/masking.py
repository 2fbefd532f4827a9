"""Which patches are masked: `Masker` draws, strategies are pure functions of given random numbers.

Every sample of a batch loses the same count. `True` in a boolean mask means removed; indices are row-major.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchmae.errors import ConfigError, one_of
from torchmae.nn.patches import grid_size, patchify, unpatchify
from torchmae.random import Purpose, uniform


class Mask(NamedTuple):
    """A partition of the L patches of every sample.

    Attributes:
        ids_keep: (B, K) int64, the patches the encoder sees.
        ids_masked: (B, L - K) int64, the patches to predict.
        valid: (B, L, pixels of a patch) bool, False where a pixel holds no data and enters no loss; None: all do.
    """

    ids_keep: Tensor
    ids_masked: Tensor
    valid: Tensor | None = None

    def removed(self) -> Tensor:
        """(B, L) bool, True where a patch is removed."""
        batch, kept = self.ids_keep.shape
        length = kept + self.ids_masked.shape[1]
        flags = torch.zeros(batch, length, dtype=torch.bool, device=self.ids_keep.device)
        return flags.scatter_(1, self.ids_masked, True)

    def removed_pixels(self, patch_size: Sequence[int], size: Sequence[int]) -> Tensor:
        """(B, 1, *size) bool, True where a pixel of an image of this size is removed or holds no data."""
        flags = self.removed().unsqueeze(-1).expand(-1, -1, prod(patch_size))
        flags = flags if self.valid is None else flags | ~self.valid
        return unpatchify(flags, patch_size, grid_size(size, patch_size))

    def check(self, batch: int, length: int) -> None:
        """Raises ConfigError unless this is the mask of `batch` images of `length` patches."""
        own = (len(self.ids_keep), self.ids_keep.shape[1] + self.ids_masked.shape[1])
        if own != (batch, length):
            raise ConfigError(
                f"the mask is for {own[0]} images of {own[1]} patches, the batch has {batch} of {length}",
                "give every image of the batch a mask of its own grid",
            )

    def to(self, device: torch.device | str) -> Mask:
        """The same mask on another device."""
        valid = None if self.valid is None else self.valid.to(device)
        return Mask(self.ids_keep.to(device), self.ids_masked.to(device), valid)

    def tensor_split(self, parts: int) -> list[Mask]:
        """The masks of the parts that `Tensor.tensor_split` cuts the batch into."""
        split = ([None] * parts if part is None else part.tensor_split(parts) for part in self)
        return [Mask(*each) for each in zip(*split, strict=True)]

    def among(self, valid: Tensor, ratio: float) -> Mask:
        """The mask of images some of whose pixels hold no data; `valid` is as in `Mask`.

        Kept patches are taken in the order of this mask from those with a valid pixel. Their number is lowered, to half
        at most, where an image of the batch would have less than half of its valid patches masked, or less than
        `ratio`. An image with fewer valid patches than that has no valid patch to predict: it weighs nothing.
        """
        order = torch.cat([self.ids_keep, self.ids_masked], 1)
        has_data = valid.any(-1)
        order = order.gather(1, (~has_data).gather(1, order).int().argsort(dim=1, stable=True))
        counts, keep = [*has_data.sum(1).tolist(), order.shape[1]], self.ids_keep.shape[1]
        fewest = min(counts)
        keep = min(keep, max(-(-keep // 2), fewest // 2, round(fewest * (1 - ratio))))
        return Mask(order[:, :keep].contiguous(), order[:, keep:].contiguous(), valid)


def num_keep(length: int, ratio: float) -> int:
    """K = clamp(round(L (1 - r)), 1, L - 1): at least one patch is kept and at least one removed.

    Departure: K is rounded, where the official code rounds down.

    Raises:
        ConfigError: a ratio outside (0, 1), or fewer than two patches.
    """
    check_ratio(ratio)
    if length < 2:
        raise ConfigError(f"the image has {length} patches", "masking needs at least 2: use a smaller patch")
    return min(max(round(length * (1 - ratio)), 1), length - 1)


def random_mask(noise: Tensor, grid: Sequence[int], ratio: float) -> Mask:
    """Removes patches at random, without regard to place (paper section 3, "Masking").

    Args:
        noise: (B, L) uniform random numbers; the K patches with the smallest are kept.
        grid: patches along each axis, L in all.
        ratio: share that is removed, in (0, 1).
    """
    return _keep_smallest(noise, num_keep(prod(grid), ratio))


def block_mask(noise: Tensor, grid: Sequence[int], ratio: float) -> Mask:
    """Removes one contiguous block (paper, figure 6, "block"), of random centre and proportions.

    Patches are removed in order of their distance from the centre, so the count is exact and the block is connected;
    the middle of an image is removed more often than its corners, and at ratios above about 0.6 its very middle always.
    Departure: one block, where the paper takes BEiT's union of several.

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


def cells_mask(noise: Tensor, grid: Sequence[int], ratio: float, *, side: int) -> Mask:
    """Removes whole cells of neighbouring patches at random, which leaves larger holes at the same ratio.

    The count is exact: of one cell, a part is removed where the cells do not add up to it.

    Args:
        noise: (B, number of cells) uniform random numbers.
        grid: patches along each axis; cells at the end of an axis are smaller where `side` does not divide it.
        ratio: share that is removed, in (0, 1).
        side: patches of a cell along each axis.
    """
    keep = num_keep(prod(grid), ratio)
    cells = torch.arange(noise.shape[1], device=noise.device).view(_num_cells(grid, side))
    for axis, size in enumerate(grid):
        cells = cells.repeat_interleave(side, axis).narrow(axis, 0, size)
    return _keep_smallest(noise[:, cells.flatten()], keep)


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


def evenly_spaced(ids: Tensor, share: float) -> Tensor:
    """An evenly strided subset of about `share` of the indices: (B, M) to (B, max(1, round(M * share))).

    Strategies order what they mask: at random, by distance, by the grid. A strided subset represents the whole.
    """
    count = max(1, round(ids.shape[1] * share))
    steps = torch.arange(count, device=ids.device) * ids.shape[1] // count
    return ids[:, steps]


class Strategy(NamedTuple):
    """A way to choose what is masked.

    Attributes:
        draw: called with (B, `noise_count(grid)`) uniform random numbers, the grid and the ratio; gives the mask.
        noise_count: random numbers that one sample takes.
        evaluated: evaluation measures it when no strategy is named.
    """

    draw: Callable[[Tensor, Sequence[int], float], Any]
    noise_count: Callable[[Sequence[int]], int]
    evaluated: bool = True


STRATEGIES: dict[str, Strategy] = {
    "random": Strategy(random_mask, prod),
    "block": Strategy(block_mask, lambda grid: 2 * len(grid)),
    "grid": Strategy(grid_mask, len),
    "cells2": Strategy(partial(cells_mask, side=2), lambda grid: prod(_num_cells(grid, 2)), evaluated=False),
    "cells4": Strategy(partial(cells_mask, side=4), lambda grid: prod(_num_cells(grid, 4)), evaluated=False),
}


class Maskable(Protocol):
    """What a `Masker` asks of an encoder; `nn.encoder.Encoder` says what each of them is."""

    grid: tuple[int, ...]
    patch_size: tuple[int, ...]
    strategies: Mapping[str, Strategy]

    def grid_of(self, images: Tensor) -> tuple[int, ...]: ...  # noqa: D102


@dataclass(frozen=True)
class Masker:
    """Draws the masks of a model: `masker(seed, epoch, indices)` is a function and changes nothing.

    Attributes:
        encoder: whose grid is masked.
        strategy: a name in `encoder.strategies`, or a strategy of one's own.
        ratio: share that is removed, in (0, 1).
        final_ratio: the share at the end of a run; None: `ratio` stays.
        grid: of the images; None: of those that the encoder was made for.

    Raises:
        ConfigError: a strategy that the encoder does not have.
    """

    encoder: Maskable
    strategy: str | Strategy = "random"
    ratio: float = 0.75
    final_ratio: float | None = None
    grid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.strategy, str):
            one_of("mask.strategy", self.strategy, self.encoder.strategies)

    def __call__(
        self,
        seed: int,
        epoch: npt.NDArray[np.integer] | int,
        indices: npt.NDArray[np.int64],
        device: torch.device | str = "cpu",
        valid: Tensor | None = None,
    ) -> Any:
        """The masks of the samples with these indices in an epoch.

        `valid`, (B, 1, *size) bool on the device, is False where a pixel holds no data; None: all do. ConfigError: it
        is given, and the encoder has no patches.
        """
        noise = torch.from_numpy(uniform(seed, epoch, indices, Purpose.MASK, self.noise_count))
        if torch.device(device).type == "cuda":  # from other than pinned memory, the copy would wait for queued work
            noise = noise.pin_memory()
        mask = self.from_noise(noise.to(device, non_blocking=noise.is_pinned()))
        if valid is None or not len(valid):  # a rank may have no images
            return mask
        if not self.encoder.patch_size:
            raise ConfigError("some pixels hold no data, and this model has no patches", "use a vit model")
        return mask.among(patchify(valid, self.encoder.patch_size), self.ratio)

    def from_noise(self, noise: Tensor) -> Any:
        """The masks, on its device, that (B, `noise_count`) uniform random numbers give."""
        return self._rule.draw(noise, self.grid or self.encoder.grid, self.ratio)

    @property
    def noise_count(self) -> int:
        """Random numbers that one sample takes."""
        return self._rule.noise_count(self.grid or self.encoder.grid)

    def at(self, step: float, total: int) -> Masker:
        """The masker of a step (0 to total - 1): its ratio lies on a straight line from `ratio` to `final_ratio`."""
        if self.final_ratio is None:
            return self
        ratio = self.ratio + (self.final_ratio - self.ratio) * step / max(total - 1, 1)
        return replace(self, ratio=ratio, final_ratio=None)

    def for_images(self, images: Tensor) -> Masker:
        """The masker of images (B, C, *size) of this size."""
        return replace(self, grid=self.encoder.grid_of(images))

    @property
    def _rule(self) -> Strategy:
        return self.encoder.strategies[self.strategy] if isinstance(self.strategy, str) else self.strategy


def check_ratio(ratio: float) -> None:
    """Raises ConfigError for a ratio outside (0, 1)."""
    if not 0 < ratio < 1:
        raise ConfigError(f"mask ratio is {ratio:g}", "it must lie between 0 and 1, both excluded; the paper uses 0.75")


def _num_cells(grid: Sequence[int], side: int) -> list[int]:
    """Cells along each axis."""
    return [-(-size // side) for size in grid]


def _coordinates(grid: Sequence[int], device: torch.device) -> Tensor:
    """(L, n) float32, the place of each patch in the grid."""
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(grid))


def _keep_smallest(order: Tensor, keep: int) -> Mask:
    ids = order.argsort(dim=1, stable=True)
    return Mask(ids[:, :keep].contiguous(), ids[:, keep:].contiguous())
