"""A contrastive loss between two views of each image (SimCLR, Chen et al. 2020, arXiv 2002.05709)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, DIM = 512, 128  # widths of the projection


class Contrast(nn.Module):
    """Tells the other view of an image from the views of all other images: NT-Xent on projected features.

    Args:
        width: of the features, D.
        temperature: divides the cosines; lower ones weigh the most similar images more.
    """

    def __init__(self, width: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        # Statistics of the batch alone: nothing but weights is kept, and evaluation never comes here.
        norm = nn.BatchNorm1d(HIDDEN, track_running_stats=False)
        self.head = nn.Sequential(
            nn.Linear(width, HIDDEN, bias=False), norm, nn.GELU(), nn.Linear(HIDDEN, DIM, bias=False)
        )

    def forward(self, features: Tensor) -> Tensor:
        """The loss, a scalar float32, of features (2 B, D); rows 2 i and 2 i + 1 are the two views of image i."""
        z = F.normalize(self.head(features).float(), dim=1)
        places = torch.arange(len(z), device=z.device)
        similarity = (z @ z.T / self.temperature).masked_fill(places[:, None] == places, float("-inf"))
        return F.cross_entropy(similarity, places ^ 1)
