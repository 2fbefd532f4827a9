"""Features of many images."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from torchmae.data.loader import Batch
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.training.runtime import Runtime

# The side, by the number of axes, that images are averaged down to as features: full ones of ten thousand photographs
# would take gigabytes.
_PIXEL_SIDE = {1: 1024, 2: 32, 3: 10}
_POOL: dict[int, Callable[..., Tensor]] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


@torch.no_grad()
def extract(
    model: MaskedAutoencoder, batches: Iterable[Batch], runtime: Runtime, pool: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Features and labels of all batches, on the model's device; nothing is masked.

    Args:
        model: put into eval mode.
        batches: images without augmentation.
        runtime: where to compute.
        pool: as for `MaskedAutoencoder.encode`.

    Returns:
        (N, D) float32 and (N,) int64, -1 where unknown.
    """
    model.eval()
    features, labels = [], []
    for batch in batches:
        with runtime.autocast():
            features.append(model.encode(batch.images, pool).float())
        labels.append(batch.labels)
    return torch.cat(features), torch.cat(labels)


def pixels(batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """The images themselves as features: the baseline that a model has to beat.

    Returns:
        (N, D) float32, all values of an image, those of more than 32 x 32 pixels averaged down to that (1024 on one
        axis, 10 x 10 x 10 on three); and (N,) int64 labels.
    """
    pairs = [(shrink(batch.images).flatten(1), batch.labels) for batch in batches]
    return torch.cat([images for images, _ in pairs]), torch.cat([labels for _, labels in pairs])


def shrink(images: Tensor) -> Tensor:
    """(B, C, *size): images of more than 32 x 32 pixels (1024 on one axis, 10 x 10 x 10 on three) averaged down."""
    axes = images.ndim - 2
    size = [min(side, _PIXEL_SIDE[axes]) for side in images.shape[2:]]
    return images if list(images.shape[2:]) == size else _POOL[axes](images, size)
