"""Images to patches and back, for 1, 2 or 3 spatial dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from torchmae.errors import ConfigError

NORM_EPS = 1e-6


def grid_size(input_size: Sequence[int], patch_size: Sequence[int]) -> tuple[int, ...]:
    """How many patches fit along each axis.

    Raises:
        ConfigError: another number of dimensions, a patch below 1, or a size that the patch does not divide.
    """
    if len(input_size) != len(patch_size) or not 1 <= len(input_size) <= 3:
        raise ConfigError(
            f"input size {_text(input_size)} has {len(input_size)} dimensions and patch size {_text(patch_size)} has "
            f"{len(patch_size)}",
            "give both the same 1, 2 or 3 numbers",
        )
    if min(patch_size) < 1:
        raise ConfigError(f"patch size is {_text(patch_size)}", "it must be 1 or more along each axis")
    for size, patch in zip(input_size, patch_size, strict=True):
        if size < 1 or size % patch:
            nearest = max(1, round(size / patch)) * patch
            raise ConfigError(
                f"patch size {_text(patch_size)} does not divide input size {_text(input_size)}",
                f"use an input size that is a multiple of the patch, such as {nearest} in place of {size}",
            )
    return tuple(size // patch for size, patch in zip(input_size, patch_size, strict=True))


def patchify(images: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Cuts images into patches.

    Args:
        images: (B, C, *size), with 1, 2 or 3 spatial dimensions.
        patch_size: pixels along each of them.

    Returns:
        (B, L, P): patches in row-major order; P = prod(patch_size) * C, channels last within a patch, which is
        the order of the released MAE weights' predictions.

    Raises:
        ConfigError: a size that the patch does not divide.
    """
    batch, channels = images.shape[:2]
    grid = grid_size(images.shape[2:], patch_size)
    n = len(grid)
    split = [size for pair in zip(grid, patch_size, strict=True) for size in pair]
    axes = (0, *range(2, 2 + 2 * n, 2), *range(3, 3 + 2 * n, 2), 1)
    return images.reshape(batch, channels, *split).permute(axes).reshape(batch, prod(grid), -1)


def unpatchify(patches: Tensor, patch_size: Sequence[int], grid: Sequence[int]) -> Tensor:
    """The inverse of `patchify`: (B, L, P) to (B, C, *size)."""
    batch = len(patches)
    n = len(grid)
    channels = patches.shape[2] // prod(patch_size)
    axes = (0, 1 + 2 * n, *(axis for i in range(n) for axis in (1 + i, 1 + n + i)))
    size = [g * p for g, p in zip(grid, patch_size, strict=True)]
    return patches.reshape(batch, *grid, *patch_size, channels).permute(axes).reshape(batch, channels, *size)


def gather(tokens: Tensor, ids: Tensor) -> Tensor:
    """Picks tokens: (B, L, D) at (B, K) indices gives (B, K, D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


def patch_statistics(patches: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch, over its pixels and channels together: two tensors (B, L, 1).

    The variance is the unbiased one and `NORM_EPS` stands inside the root, as in the released MAE weights' training
    (paper section 4.1, "normalized pixels"). `valid`, (B, L, P), is 1 where a value counts and 0 elsewhere.
    """
    if valid is None:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    else:
        count = valid.sum(-1, keepdim=True)
        mean = (patches * valid).sum(-1, keepdim=True) / count.clamp(min=1)
        variance = ((patches - mean).square() * valid).sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return mean, (variance + NORM_EPS).sqrt()


def _text(size: Sequence[int]) -> str:
    return "x".join(str(value) for value in size)
