from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchmae.errors import ConfigError
from torchmae.nn.masking import (
    STRATEGIES,
    Mask,
    block_mask,
    grid_mask,
    mask_from_pixels,
    mask_from_tokens,
    num_keep,
    random_mask,
)
from torchmae.nn.patches import patchify
from torchmae.random import Purpose, uniform
from torchmae.tutorial import mlp as tutorial

grids = st.one_of(
    st.tuples(st.integers(2, 40)),
    st.tuples(st.integers(1, 9), st.integers(2, 9)),
    st.tuples(st.integers(1, 4), st.integers(2, 4), st.integers(1, 5)),
)  # always two patches or more
ratios = st.floats(0.01, 0.99)


def draw(strategy: str, grid: Sequence[int], ratio: float, seed: int, batch: int) -> Mask:
    noise = torch.from_numpy(uniform(seed, 0, np.arange(batch), Purpose.MASK, STRATEGIES[strategy].noise_count(grid)))
    return STRATEGIES[strategy].draw(noise, grid, ratio)


def is_partition(mask: Mask, length: int) -> bool:
    both = torch.cat([mask.ids_keep, mask.ids_masked], dim=1)
    return torch.equal(both.sort(dim=1).values, torch.arange(length).expand(len(both), -1))


def is_connected(cells: set[tuple[int, ...]]) -> bool:
    """Whether steps to the next patch along one axis lead from any of the cells to every other."""
    waiting = [next(iter(cells))]
    reached = set(waiting)
    while waiting:
        cell = waiting.pop()
        for axis in range(len(cell)):
            for step in (-1, 1):
                near = (*cell[:axis], cell[axis] + step, *cell[axis + 1 :])
                if near in cells and near not in reached:
                    reached.add(near)
                    waiting.append(near)
    return reached == cells


@pytest.mark.parametrize("length", [2, 3, 4, 16, 49, 64, 196, 256, 1000])
def test_num_keep_on_a_sweep(length: int) -> None:
    for ratio in np.linspace(0.005, 0.995, 199):
        kept = num_keep(length, float(ratio))
        wanted = length * (1 - ratio)
        assert 1 <= kept <= length - 1
        assert (
            abs(kept - wanted) <= 0.5 + 1e-9
            or (wanted < 1 and kept == 1)
            or (wanted > length - 1 and kept == length - 1)
        )


def test_num_keep_of_the_paper() -> None:
    assert num_keep(196, 0.75) == 49
    assert num_keep(256, 0.75) == 64
    assert num_keep(16, 0.99) == 1
    assert num_keep(16, 0.01) == 15


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, 75, float("nan")])
def test_a_ratio_outside_the_open_interval_is_an_error(ratio: float) -> None:
    for strategy in (STRATEGIES | tutorial.STRATEGIES).values():
        noise = torch.rand(1, strategy.noise_count((4, 4)))
        with pytest.raises(ConfigError, match=r"mask ratio is .*between 0 and 1"):
            strategy.draw(noise, (4, 4), ratio)


def test_one_patch_cannot_be_masked() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        random_mask(torch.rand(1, 1), (1, 1), 0.5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(grid=grids, ratio=ratios, seed=st.integers(0, 2**64 - 1), batch=st.integers(1, 5))
def test_every_strategy_partitions_with_exact_counts(
    strategy: str, grid: tuple[int, ...], ratio: float, seed: int, batch: int
) -> None:
    mask = draw(strategy, grid, ratio, seed, batch)
    kept = num_keep(prod(grid), ratio)
    assert mask.ids_keep.shape == (batch, kept)
    assert mask.ids_masked.shape == (batch, prod(grid) - kept)
    assert mask.ids_keep.dtype == mask.ids_masked.dtype == torch.int64
    assert is_partition(mask, prod(grid))
    removed = mask.removed()
    assert removed.dtype == torch.bool
    assert removed.gather(1, mask.ids_masked).all()
    assert not removed.gather(1, mask.ids_keep).any()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sample_s_mask_depends_on_its_own_noise_alone(strategy: str) -> None:
    noise = torch.rand(6, STRATEGIES[strategy].noise_count((5, 7)))
    whole = STRATEGIES[strategy].draw(noise, (5, 7), 0.6)
    again = STRATEGIES[strategy].draw(noise.clone(), (5, 7), 0.6)
    assert torch.equal(whole.ids_keep, again.ids_keep)
    assert torch.equal(whole.ids_masked, again.ids_masked)
    for i in range(6):
        alone = STRATEGIES[strategy].draw(noise[i : i + 1], (5, 7), 0.6)
        assert torch.equal(alone.ids_keep[0], whole.ids_keep[i])
        assert torch.equal(alone.ids_masked[0], whole.ids_masked[i])
    assert len({tuple(ids) for ids in whole.removed().tolist()}) > 1


def test_random_keeps_the_smallest_noise() -> None:
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.2, 0.8, 0.4, 0.6]])
    mask = random_mask(noise, (2, 2), 0.5)
    assert mask.ids_keep.tolist() == [[1, 3], [0, 2]]
    assert mask.ids_masked.tolist() == [[2, 0], [3, 1]]


@pytest.mark.parametrize("strategy", ["random", "grid"])
@pytest.mark.parametrize(("grid", "ratio"), [((4, 4), 0.75), ((5, 7), 0.6), ((12,), 0.5), ((2, 3, 4), 0.9)])
def test_random_and_grid_keep_every_patch_equally_often(strategy: str, grid: tuple[int, ...], ratio: float) -> None:
    draws = 5000
    mask = draw(strategy, grid, ratio, 7, draws)
    rate = 1 - mask.removed().double().mean(0)
    wanted = num_keep(prod(grid), ratio) / prod(grid)
    # Each patch is kept in a binomial number of draws; five standard deviations.
    assert (rate - wanted).abs().max() < 5 * (wanted * (1 - wanted) / draws) ** 0.5


def test_random_draws_patches_independently_of_place() -> None:
    # Of two patches the chance that both are kept is K(K-1) / L(L-1), neighbours or not.
    kept = (~draw("random", (4, 4), 0.75, 3, 8000).removed()).double()
    together = (kept.T @ kept / len(kept))[~torch.eye(16, dtype=torch.bool)]
    wanted = 4 * 3 / (16 * 15)
    assert (together - wanted).abs().max() < 5 * (wanted * (1 - wanted) / len(kept)) ** 0.5


@given(grid=grids, ratio=ratios, seed=st.integers(0, 2**64 - 1))
def test_block_hides_one_connected_region(grid: tuple[int, ...], ratio: float, seed: int) -> None:
    cells = list(np.ndindex(*grid))
    for ids in draw("block", grid, ratio, seed, 8).ids_masked.tolist():
        assert is_connected({tuple(map(int, cells[i])) for i in ids})


@pytest.mark.parametrize("grid", [(16,), (8, 8), (6, 10), (4, 4, 4)])
def test_block_hides_and_keeps_every_patch_sometimes(grid: tuple[int, ...]) -> None:
    rate = draw("block", grid, 0.4, 1, 4000).removed().double().mean(0)
    assert rate.min() > 0
    assert rate.max() < 1
    assert rate.mean() == pytest.approx(1 - num_keep(prod(grid), 0.4) / prod(grid))


@pytest.mark.parametrize("ratio", np.arange(0.02, 1, 0.04))
def test_a_block_around_the_very_middle_of_a_patch_is_connected(ratio: float) -> None:
    # Whole rings of patches are equally far away here.
    mask = block_mask(torch.full((1, 4), 0.5), (5, 5), ratio)
    assert is_connected({divmod(i, 5) for i in mask.ids_masked[0].tolist()})


@pytest.mark.parametrize(
    ("proportions", "height", "width"), [((0.0, 1.0), 16, 4), ((0.5, 0.5), 8, 8), ((1.0, 0.0), 4, 16)]
)
def test_block_proportions(proportions: tuple[float, float], height: int, width: int) -> None:
    removed = block_mask(torch.tensor([[0.5, 0.5, *proportions]]), (16, 16), 0.25).removed().reshape(16, 16)
    assert removed.any(1).sum() == height
    assert removed.any(0).sum() == width
    assert removed.sum() == 64


def test_the_centre_of_a_block_moves() -> None:
    noise = torch.tensor([[0.1, 0.9, 0.5, 0.5]])  # first axis, second axis, proportions
    removed = block_mask(noise, (10, 10), 0.09).removed().reshape(10, 10)
    assert removed.nonzero().tolist() == [[row, column] for row in range(3) for column in range(7, 10)]


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (6, 10)])
def test_grid_keeps_one_of_every_two_by_two(grid: tuple[int, int]) -> None:
    kept = ~draw("grid", grid, 0.75, 2, 50).removed()
    assert (patchify(kept.reshape(-1, 1, *grid), (2, 2)).sum(-1) == 1).all()


def test_grid_keeps_a_checkerboard_at_half_and_every_other_at_one_axis() -> None:
    kept = ~draw("grid", (6, 8), 0.5, 2, 50).removed().reshape(-1, 6, 8)
    assert (kept[:, 1:] != kept[:, :-1]).all()
    assert (kept[:, :, 1:] != kept[:, :, :-1]).all()
    kept = ~draw("grid", (10,), 0.5, 2, 20).removed()
    assert (kept[:, 1:] != kept[:, :-1]).all()


def test_grid_keeps_one_of_every_cube_at_seven_eighths() -> None:
    kept = ~draw("grid", (4, 4, 4), 0.875, 2, 20).removed()
    assert (patchify(kept.reshape(-1, 1, 4, 4, 4), (2, 2, 2)).sum(-1) == 1).all()


def test_tokens_give_back_their_flags() -> None:
    removed = torch.tensor([[True, False, False, True, False], [False, True, True, False, False]])
    mask = mask_from_tokens(removed)
    assert mask.ids_keep.tolist() == [[1, 2, 4], [0, 3, 4]]
    assert mask.ids_masked.tolist() == [[0, 3], [1, 2]]
    assert torch.equal(mask.removed(), removed)
    assert torch.equal(mask_from_tokens(removed[0]).removed(), removed[:1])
    # A picture's 0 and 255 mean the same as False and True.
    assert torch.equal(mask_from_tokens(removed.to(torch.uint8) * 255).removed(), removed)


@given(st.integers(2, 30), st.integers(1, 4), st.data())
def test_tokens_round_trip(length: int, batch: int, data: st.DataObject) -> None:
    lost = data.draw(st.integers(1, length - 1))
    noise = torch.rand(batch, length, generator=torch.Generator().manual_seed(length * 31 + lost))
    removed = noise.argsort(dim=1) < lost
    mask = mask_from_tokens(removed)
    assert torch.equal(mask.removed(), removed)
    assert is_partition(mask, length)


@pytest.mark.parametrize(
    ("removed", "told"),
    [
        (torch.tensor([[True, False, False], [True, True, False]]), "remove 1 to 2 patches; remove the same number"),
        (torch.zeros(2, 4, dtype=torch.bool), "removes 0 of 4 patches"),
        (torch.ones(4, dtype=torch.bool), "removes 4 of 4 patches"),
    ],
)
def test_tokens_that_cannot_be_a_mask(removed: Tensor, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        mask_from_tokens(removed)


def test_a_pixel_removes_its_patch() -> None:
    hole = torch.zeros(4, 6, dtype=torch.bool)
    hole[1, 2] = True  # row 0, column 1 of the 2 x 3 patches of 2 x 2 pixels
    hole[2:, 4:] = True  # all of row 1, column 2
    mask = mask_from_pixels(hole, (2, 2))
    assert mask.ids_masked.tolist() == [[1, 5]]
    assert mask.ids_keep.tolist() == [[0, 2, 3, 4]]


def test_pixels_by_sample_and_on_other_numbers_of_axes() -> None:
    holes = torch.zeros(2, 8, dtype=torch.bool)
    holes[0, 3] = holes[1, 7] = True
    assert mask_from_pixels(holes, (2,)).ids_masked.tolist() == [[1], [3]]
    volume = torch.zeros(2, 2, 4, dtype=torch.bool)
    volume[1, 0, 3] = True
    assert mask_from_pixels(volume, (1, 2, 2)).ids_masked.tolist() == [[3]]
    holes[0, 0] = True
    with pytest.raises(ConfigError, match="remove 1 to 2 patches"):
        mask_from_pixels(holes, (2,))
    with pytest.raises(ConfigError, match="does not divide"):
        mask_from_pixels(torch.zeros(5, 4, dtype=torch.bool), (2, 2))


def test_elements_hide_their_ratio_and_the_inverted_mask_the_rest() -> None:
    noise = torch.from_numpy(uniform(0, 0, np.arange(20), Purpose.MASK, 3072))
    removed, inverted = (strategy.draw(noise, (3072,), 0.75).flags for strategy in tutorial.STRATEGIES.values())
    sigma = (0.75 * 0.25 / noise.numel()) ** 0.5
    assert removed.double().mean() == pytest.approx(0.75, abs=5 * sigma)
    assert inverted.double().mean() == pytest.approx(0.25, abs=5 * sigma)
    # The tutorial multiplies by M = (noise < 0.75): what it keeps is exactly what a true mask removes.
    assert torch.equal(~inverted, noise < 0.75)
    assert torch.equal(removed, ~inverted)


def test_a_mask_moves_between_devices() -> None:
    mask = grid_mask(torch.rand(2, 2), (4, 4), 0.75)
    moved = mask.to("meta")
    assert moved.ids_keep.device.type == moved.ids_masked.device.type == "meta"
    assert moved.ids_keep.shape == mask.ids_keep.shape


@pytest.mark.parametrize(("grid", "side", "ratio"), [((8, 8), 2, 0.75), ((8, 8), 4, 0.5), ((4, 4, 4), 2, 0.75)])
def test_cells_are_removed_as_a_whole(grid: tuple[int, ...], side: int, ratio: float) -> None:
    strategy = STRATEGIES[f"cells{side}"]
    masks = strategy.draw(torch.rand(50, strategy.noise_count(grid)), grid, ratio).removed()
    shape = [part for size in grid for part in (size // side, side)]
    inside = tuple(range(2, 2 + 2 * len(grid), 2))
    share = masks.view(50, *shape).double().mean(inside)
    assert set(share.unique().tolist()) == {0.0, 1.0}
    assert (share.flatten(1).mean(1) == ratio).all()
    assert share.flatten(1).mean(0).std() < 0.15  # no cell is preferred


def test_a_cell_is_cut_where_the_count_or_the_grid_asks_for_it() -> None:
    mask = STRATEGIES["cells2"].draw(torch.rand(4, 6), (3, 5), 0.5)
    assert mask.ids_keep.shape == (4, 8)
    cells = torch.tensor([[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]).flatten()
    for removed in mask.removed():
        cut = [cell for cell in range(6) if 0 < removed[cells == cell].double().mean() < 1]
        assert len(cut) <= 1
