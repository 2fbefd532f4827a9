from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from torchmae.errors import ConfigError
from torchmae.nn.positions import resample, sincos


def by_formula(embed_dim: int, cell: tuple[int, ...]) -> list[float]:
    frequencies = embed_dim // (2 * len(cell))
    values = []
    for coordinate in reversed(cell):
        angles = [coordinate / 10000 ** (k / frequencies) for k in range(frequencies)]
        values += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return values + [0.0] * (embed_dim - len(values))


@pytest.mark.parametrize(
    ("embed_dim", "grid"), [(16, (4, 4)), (24, (3, 5)), (8, (7,)), (24, (2, 3, 4)), (64, (2, 2, 2)), (10, (2, 3))]
)
def test_the_table_is_the_formula_last_axis_first(embed_dim: int, grid: tuple[int, ...]) -> None:
    table = sincos(embed_dim, grid)
    assert table.dtype == torch.float32
    wanted = np.array([by_formula(embed_dim, cell) for cell in np.ndindex(*grid)])
    np.testing.assert_allclose(table, wanted, atol=1e-6)


def test_the_first_half_is_the_column_and_the_second_the_row() -> None:
    table = sincos(16, (3, 5)).reshape(3, 5, 16)
    assert torch.equal(table[0, :, :8], table[2, :, :8])
    assert torch.equal(table[:, 0, 8:], table[:, 4, 8:])
    assert not torch.equal(table[0, 0, :8], table[0, 1, :8])


def test_positions_differ_from_each_other() -> None:
    table = sincos(48, (4, 6, 5))
    assert torch.pdist(table).min() > 0.1


def test_prefix_rows_are_zeros_and_shift_the_rest() -> None:
    table = sincos(16, (3, 5), num_prefix=2)
    assert table.shape == (17, 16)
    assert not table[:2].any()
    assert torch.equal(table[2:], sincos(16, (3, 5)))


@pytest.mark.parametrize(("embed_dim", "axes"), [(1, 1), (3, 2), (5, 3)])
def test_too_small_a_width_is_an_error_that_names_the_smallest(embed_dim: int, axes: int) -> None:
    with pytest.raises(ConfigError, match=f"width {embed_dim} .* {axes} axes; use {2 * axes} or more"):
        sincos(embed_dim, (2,) * axes)
    assert sincos(2 * axes, (2,) * axes).shape == (2**axes, 2 * axes)


def test_resampling_to_the_same_grid_changes_nothing() -> None:
    table = torch.randn(1 + 12, 8)
    assert torch.equal(resample(table, (3, 4), (3, 4)), table)


@pytest.mark.parametrize(
    ("old", "new"), [((4,), (9,)), ((4, 4), (6, 3)), ((3, 5), (3, 10)), ((2, 3, 4), (4, 3, 2)), ((14, 14), (7, 7))]
)
@pytest.mark.parametrize("prefix", [0, 1])
def test_resampling_keeps_the_prefix_and_constants(old: tuple[int, ...], new: tuple[int, ...], prefix: int) -> None:
    table = torch.full((prefix + math.prod(old), 6), 0.3)
    table[:prefix] = torch.randn(prefix, 6)
    moved = resample(table, old, new)
    assert moved.shape == (prefix + math.prod(new), 6)
    assert torch.equal(moved[:prefix], table[:prefix])
    torch.testing.assert_close(moved[prefix:], torch.full((math.prod(new), 6), 0.3))


def test_resampling_stretches_along_the_right_axis() -> None:
    rows = torch.arange(4.0)[:, None].expand(4, 3).reshape(-1, 1)  # varies with the row only
    moved = resample(rows, (4, 3), (8, 6)).reshape(8, 6)
    torch.testing.assert_close(moved, moved[:, :1].expand(8, 6))
    assert (moved[1:, 0] > moved[:-1, 0]).all()


def test_resampling_keeps_the_type() -> None:
    table = sincos(8, (4, 4), num_prefix=1).to(torch.bfloat16)
    assert resample(table, (4, 4), (6, 6)).dtype == torch.bfloat16
    assert resample(table, (4, 4), (4, 4)).dtype == torch.bfloat16
