"""Histograms of oriented gradients (HOG, Dalal & Triggs 2005) as a training target (MaskFeat, arXiv 2112.09133)."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 9
"""Orientations, over half a turn (Wei et al. 2022, section 3.2)."""

_LEAST_CONTRAST = 0.1  # added to a histogram's norm, so that flat patches give small values and not noise


def oriented_gradients(images: Tensor, patch_size: Sequence[int]) -> Tensor:
    """The HOG features of each patch of images (B, C, H, W): (B, L, C * BINS) float32.

    Each pixel's gradient votes with its magnitude for the two nearest of `BINS` orientations. Each channel's votes in a
    patch are divided by their norm: values are 0 or more, and their mean square is at most 1. Departure from MaskFeat:
    a cell is a patch, without a Gaussian window. `patch_size` divides the image.
    """
    images = images.float()
    batch, channels = images.shape[:2]
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    place = torch.atan2(dy, dx) % pi * (BINS / pi)  # B, C, H, W: in [0, BINS]
    below = place.floor()
    size, share = torch.hypot(dx, dy), place - below
    first = below.long() % BINS
    votes = images.new_zeros(batch, channels, BINS, *images.shape[2:])
    votes.scatter_(2, first[:, :, None], (size * (1 - share))[:, :, None])
    votes.scatter_(2, ((first + 1) % BINS)[:, :, None], (size * share)[:, :, None])
    cells = F.avg_pool2d(votes.flatten(1, 2), tuple(patch_size))
    cells = cells.view(batch, channels, BINS, *cells.shape[2:])  # B, C, BINS, h, w
    cells = cells * (sqrt(BINS) / (cells.norm(dim=2, keepdim=True) + _LEAST_CONTRAST))
    return cells.flatten(3).permute(0, 3, 1, 2).flatten(2)
