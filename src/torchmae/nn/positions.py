"""Fixed sine-cosine positions for 1, 2 or 3 axes, and their resampling to another grid."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from torchmae.errors import ConfigError

_BASE = 10000.0
_INTERPOLATION = {1: "linear", 2: "bicubic", 3: "trilinear"}


def sincos(embed_dim: int, grid: Sequence[int], num_prefix: int = 0) -> Tensor:
    """Sine-cosine positions (paper section A.1; Vaswani et al. 2017 on each axis): (num_prefix + L, embed_dim) float32.

    The width is divided evenly among the axes, last axis first, and the remainder at the end is zero. In 2-D the first
    half of each row encodes the column and the second half the row, the order of the released MAE weights. Within an
    axis sines come before cosines. The first `num_prefix` rows are zeros. ConfigError: a width below 2 per axis.
    """
    per_axis = embed_dim // (2 * len(grid))  # frequencies
    if per_axis < 1:
        raise ConfigError(
            f"width {embed_dim} is too small for positions on {len(grid)} axes", f"use {2 * len(grid)} or more"
        )
    if torch.get_default_device().type == "meta":  # as of `layers.without_weights`
        return torch.empty(num_prefix + prod(grid), embed_dim)
    omega = _BASE ** -(torch.arange(per_axis, dtype=torch.float64) / per_axis)
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    parts = []
    for coordinate in reversed(axes):
        angle = coordinate.reshape(-1, 1) * omega
        parts += [angle.sin(), angle.cos()]
    table = torch.cat(parts, dim=1)
    return F.pad(table, (0, embed_dim - table.shape[1], num_prefix, 0)).float()


def resample(table: Tensor, old_grid: Sequence[int], new_grid: Sequence[int]) -> Tensor:
    """Interpolates positions (sine-cosine or learned) to a grid with the same number of axes.

    `table` is (num_prefix + prod(old_grid), D), the result (num_prefix + prod(new_grid), D) of the same type. The first
    `num_prefix` rows stay as they are.
    """
    if tuple(old_grid) == tuple(new_grid):
        return table
    num_prefix = len(table) - prod(old_grid)
    prefix, patches = table[:num_prefix], table[num_prefix:]
    image = patches.float().reshape(*old_grid, -1).movedim(-1, 0)[None]
    image = F.interpolate(image, size=tuple(new_grid), mode=_INTERPOLATION[len(new_grid)], align_corners=False)
    return torch.cat([prefix, image[0].movedim(0, -1).reshape(prod(new_grid), -1).to(table.dtype)])
