"""Features of many images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from torchmae.data.loader import Batch
from torchmae.nn.autoencoder import Autoencoder
from torchmae.training.runtime import Runtime


@torch.no_grad()
def extract(
    model: Autoencoder, batches: Iterable[Batch], runtime: Runtime, pool: str = "mean"
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
    """The images themselves, flattened, as features: the baseline that a model has to beat."""
    pairs = [(batch.images.flatten(1), batch.labels) for batch in batches]
    return torch.cat([images for images, _ in pairs]), torch.cat([labels for _, labels in pairs])
