"""Interpolation of masked pixels from the visible ones: the baseline of every reconstruction, without learning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RELAXATIONS = 64
_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def interpolate(images: Tensor, removed: Tensor) -> Tensor:
    """Fills the removed pixels of (B, C, *size) images by smooth interpolation, each channel on its own.

    Pull-push (Gortler et al. 1996) fills holes from averages of the visible pixels, from coarse grids to fine ones.
    Relaxation then brings the result near the membrane, where every removed pixel is the mean of its neighbours.
    `removed` is (B, 1 or C, *size) bool. Visible pixels stay; a channel without any becomes zero.
    """
    visible = (~removed).to(images.dtype).expand_as(images)
    filled = torch.where(removed, _pull_push(images * visible, visible), images)
    for _ in range(RELAXATIONS):
        filled = torch.where(removed, _neighbour_mean(filled), filled)
    return filled


def _pull_push(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted averages from coarse to fine; `values` are already multiplied by `weight`, in [0, 1]."""
    size = values.shape[2:]
    here = values / weight.clamp(min=1e-6)
    if max(size) == 1:
        return here
    pool = _POOL[len(size)]
    window = [min(side, 2) for side in size]  # an axis that is down to one pixel waits for the others
    coarse = _pull_push(
        pool(values, window, ceil_mode=True, count_include_pad=False),
        pool(weight, window, ceil_mode=True, count_include_pad=False),
    )
    below = F.interpolate(coarse, size=size, mode=LINEAR[len(size)], align_corners=False)
    return torch.where(weight > 0, here, below)


def _neighbour_mean(images: Tensor) -> Tensor:
    """The mean of the two neighbours along every axis; at a border the pixel itself stands in."""
    n = images.ndim - 2
    padded = F.pad(images, (1, 1) * n, mode="replicate")
    total = torch.zeros_like(images)
    for axis in range(2, 2 + n):
        for start in (0, 2):
            view = padded
            for other in range(2, 2 + n):
                view = view.narrow(other, start if other == axis else 1, images.shape[other])
            total = total + view
    return total / (2 * n)
