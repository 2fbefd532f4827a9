from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from torchmae.training.update_size import copy_matrices, update_to_weight


def test_the_ratio_is_of_norms_over_all_matrices() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    before = copy_matrices(model)
    assert [tuple(matrix.shape) for matrix in before] == [(2, 2), (1, 2)]
    with torch.no_grad():
        model[0].weight += 0.3
        model[2].weight -= 0.6
        for vector in (model[0].bias, model[1].weight, model[2].bias):
            vector += 100
    expected = math.sqrt(4 * 0.3**2 + 2 * 0.6**2) / math.sqrt(6 * 3.0**2)
    assert update_to_weight(before, model).item() == pytest.approx(expected)


def test_a_step_of_sgd_is_as_large_as_its_learning_rate_says() -> None:
    model = nn.Linear(4, 3)
    before = copy_matrices(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(torch.randn(5, 4)).square().mean().backward()
    gradient, weight = model.weight.grad, before[0]
    assert gradient is not None
    optimizer.step()
    expected = 0.01 * (gradient.norm() / weight.norm()).item()
    assert update_to_weight(before, model).item() == pytest.approx(expected, rel=1e-4)


def test_frozen_weights_and_no_update() -> None:
    model = nn.Linear(4, 3)
    model.weight.requires_grad_(False)
    assert copy_matrices(model) == []
    model.weight.requires_grad_(True)
    assert update_to_weight(copy_matrices(model), model).item() == 0
