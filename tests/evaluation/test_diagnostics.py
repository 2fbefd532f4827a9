from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import tiny
import torch

from torchmae.config import EvalConfig
from torchmae.data.arrays import ArraySource
from torchmae.data.loader import Batch
from torchmae.data.reading import BadFiles
from torchmae.evaluation.diagnostics import FeatureProbe, effective_rank
from torchmae.evaluation.subject import pixels


def test_equal_directions_count_in_full() -> None:
    # Rows +e_i and -e_i: centred, with equal singular values.
    features = torch.cat([torch.eye(6), -torch.eye(6)])
    assert effective_rank(features) == pytest.approx(6)


def test_unequal_directions_count_by_the_entropy_of_their_singular_values() -> None:
    scale = torch.tensor([3.0, 1.0])
    features = torch.cat([torch.diag(scale), -torch.diag(scale)])
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(features) == pytest.approx(expected)


def test_neither_shift_nor_scale_nor_rotation_matters() -> None:
    features = torch.randn(50, 8).double() * torch.arange(1, 9)
    rotation = torch.linalg.qr(torch.randn(8, 8).double()).Q
    assert effective_rank(100 + 7 * features @ rotation) == pytest.approx(effective_rank(features), rel=1e-6)


def test_one_direction_is_one_and_none_is_none() -> None:
    line = torch.linspace(-1, 1, 20)[:, None] * torch.randn(1, 5) + 2
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.full((9, 4), 0.1)) == 0
    assert effective_rank(torch.zeros(9, 4)) == 0


def test_collapse_shows() -> None:
    features = torch.randn(200, 32)
    collapsed = features * 1e-3 + torch.randn(200, 1) * torch.randn(1, 32)
    assert effective_rank(features) > 25
    assert effective_rank(collapsed) < 1.2


class WithStandIns:
    """In place of an ImageLoader: of two classes, black and white, where some files are unreadable, and the images
    that are read in their place have no label."""

    def __init__(self, count: int, unreadable: list[int]) -> None:
        self.labels = np.arange(count) % 2
        self.source = ArraySource(np.zeros((count, 4, 4, 1), dtype=np.uint8))
        self.bad = BadFiles(count, 1.0)
        self._unreadable = unreadable

    def eval_batches(self, indices: np.ndarray, batch_size: int) -> Iterator[Batch]:
        labels = torch.from_numpy(self.labels[indices])
        images = labels.float()[:, None, None, None].expand(-1, 1, 4, 4) + torch.rand(len(indices), 1, 4, 4) / 10
        labels = labels.masked_fill(torch.isin(torch.from_numpy(indices), torch.tensor(self._unreadable)), -1)
        for index in self._unreadable:
            self.bad.add(self.source.name(index), "broken")
        yield Batch(images, labels, indices, 0)


def test_a_stand_in_does_not_count() -> None:
    probe = FeatureProbe(WithStandIns(40, [3, 8]), WithStandIns(20, [0]), EvalConfig())  # type: ignore[arg-type]
    assert probe.run(pixels(), tiny.RUNTIME) == {"knn": 100.0, "linear": 100.0}
