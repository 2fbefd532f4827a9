"""A contrastive loss between views of each image (SimCLR, Chen et al. 2020, arXiv 2002.05709)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, DIM = 512, 128  # widths of the projection
NOTHING = -1e4  # a similarity that adds nothing to a sum of exponentials


class Contrast(nn.Module):
    """NT-Xent on projected features: a view must find another view of its image among those of all other images.

    Args:
        width: of the features, D.
        temperature: divides the cosines; lower ones weigh the most similar images more.
        views: number of views of each image, V.
    """

    def __init__(self, width: int, temperature: float, views: int) -> None:
        super().__init__()
        self.temperature = temperature
        self.views = views
        # Statistics of the batch alone: nothing but weights is kept, and evaluation never comes here.
        norm = nn.BatchNorm1d(HIDDEN, track_running_stats=False)
        self.head = nn.Sequential(
            nn.Linear(width, HIDDEN, bias=False), norm, nn.GELU(), nn.Linear(HIDDEN, DIM, bias=False)
        )

    def forward(self, features: Tensor) -> Tensor:
        """The loss, a scalar float32, the mean over all pairs of views of an image.

        `features` are (B V, D), the views of an image in successive rows.
        """
        z = F.normalize(self.head(features).float(), dim=1)
        image = torch.arange(len(z), device=z.device) // self.views
        same = image[:, None] == image
        with torch.autocast(z.device.type, enabled=False):  # bf16 would round similarities to sixteenths
            similarity = z @ z.T / self.temperature
        others = similarity.masked_fill(same, NOTHING).logsumexp(1, keepdim=True)
        each = F.softplus(others - similarity)  # the cross-entropy of a view among itself and those of other images
        pairs = same.clone().fill_diagonal_(False)
        return each.masked_fill(~pairs, 0.0).sum() / pairs.sum()
