from __future__ import annotations

import math

import pytest
import torch

from torchmae.evaluation.diagnostics import effective_rank


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
