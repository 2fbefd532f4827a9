"""Is training healthy? Figures that tell before the loss does."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(features: Tensor) -> float:
    """How many directions features really use: exp of the entropy of their normalised singular values.

    Features that collapse onto a few directions keep a low loss for a while, but no longer tell images apart; this
    figure falls at once. It is a number of directions: between 1 and min(N - 1, D), and D only where every direction
    carries the same weight. Source: Roy and Vetterli 2007, "The effective rank"; as a measure of learned features
    Garrido et al. 2023 (RankMe). Unlike there, features are centred: what all images share does not count.

    Args:
        features: (N, D), N 2 or more.

    Returns:
        0 when all rows are the same.
    """
    assert features.ndim == 2 and len(features) >= 2
    rows = features.detach().double().cpu()
    size = rows.abs().max()
    singular = torch.linalg.svdvals(rows - rows.mean(0))
    # Rows that differ by rounding errors alone do not differ.
    if not singular[0] > 1e-6 * size:
        return 0.0
    share = singular / singular.sum()
    return torch.special.entr(share).sum().exp().item()
