from __future__ import annotations

import numpy as np
import pytest
import torch

from torchmae import presets
from torchmae.data.loader import Batch
from torchmae.evaluation.features import extract, pixels
from torchmae.training.runtime import Runtime

FP32 = Runtime(torch.device("cpu"), "fp32", 1)
BF16 = Runtime(torch.device("cpu"), "bf16", 1)


def batches(*size: int, channels: int = 1) -> list[Batch]:
    images = torch.randn(5, channels, *size)
    labels = torch.tensor([3, -1, 0, 1, 2])
    return [Batch(images[part], labels[part], np.arange(5)[part], 0) for part in (slice(0, 3), slice(3, 5))]


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_features_of_all_batches_in_order(pool: str) -> None:
    model = presets.build("vit_digits", depth=1, embed_dim=16, drop_path=0.9).train()
    features, labels = extract(model, batches(8, 8), FP32, pool)
    torch.manual_seed(0)
    whole = torch.cat([batch.images for batch in batches(8, 8)])
    assert not model.training  # nothing was dropped
    torch.manual_seed(0)
    features, labels = extract(model, batches(8, 8), FP32, pool)
    torch.testing.assert_close(features, model.encode(whole, pool))
    assert labels.tolist() == [3, -1, 0, 1, 2]
    assert not features.requires_grad
    torch.manual_seed(0)
    rounded, _ = extract(model, batches(8, 8), BF16, pool)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - features).abs().max() < 0.1


def test_small_images_are_their_own_features() -> None:
    parts = batches(8, 32, channels=3)
    features, labels = pixels(parts)
    assert torch.equal(features, torch.cat([batch.images for batch in parts]).flatten(1))
    assert labels.tolist() == [3, -1, 0, 1, 2]


@pytest.mark.parametrize(
    ("size", "count"), [((1000,), 1000), ((4096,), 1024), ((64, 32), 1024), ((224, 224), 1024), ((20, 20, 5), 500)]
)
def test_large_images_are_averaged_down(size: tuple[int, ...], count: int) -> None:
    parts = batches(*size, channels=2)
    features, _ = pixels(parts)
    assert features.shape == (5, 2 * count)
    means = torch.cat([batch.images for batch in parts]).flatten(2).mean(-1)
    torch.testing.assert_close(features.view(5, 2, count).mean(-1), means)
