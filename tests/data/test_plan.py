from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmae.data import loader
from torchmae.data.arrays import ArraySource
from torchmae.data.loader import Indices, Plan, hold_out, shard
from torchmae.random import permutation

small = st.integers(1, 60)


@given(small, small, st.integers(0, 2**64 - 1))
def test_every_epoch_holds_every_sample_once(num_samples: int, batch_size: int, seed: int) -> None:
    plan = Plan(num_samples, batch_size, seed)
    assert plan.steps_per_epoch == -(-num_samples // batch_size)
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        batches = [plan.indices(step) for step in steps]
        assert {number for number, _ in batches} == {epoch}
        assert all(len(batch) == batch_size for _, batch in batches[:-1])
        joined = np.concatenate([batch for _, batch in batches])
        assert sorted(joined.tolist()) == list(range(num_samples))


def test_order_depends_on_seed_and_epoch_and_not_on_what_was_asked_before() -> None:
    plan = Plan(100, 10, 3)
    first, second = plan.indices(0)[1], plan.indices(10)[1]
    assert (first != second).any()
    np.testing.assert_array_equal(plan.indices(0)[1], first)  # back an epoch
    np.testing.assert_array_equal(Plan(100, 10, 3).indices(10)[1], second)
    assert (Plan(100, 10, 4).indices(0)[1] != first).any()
    assert plan == Plan(100, 10, 3)


def test_an_order_is_made_once_though_one_reads_ahead_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(seed: int, epoch: int, count: int) -> Indices:
        made.append(epoch)
        return permutation(seed, epoch, count)

    loader._order.cache_clear()
    monkeypatch.setattr(loader, "permutation", counted)
    plan = Plan(10, 3, 0)
    for step in range(16):
        plan.indices(step + 3)
        plan.indices(step)
    assert made == [0, 1, 2, 3, 4]


def test_fewer_samples_than_a_batch_are_one_batch() -> None:
    epoch, indices = Plan(3, 256, 0).indices(5)
    assert epoch == 5
    assert sorted(indices.tolist()) == [0, 1, 2]


@given(st.integers(0, 50), st.integers(1, 9))
def test_shards_join_to_the_batch(size: int, world_size: int) -> None:
    batch = np.arange(size)[::-1]
    parts = [shard(batch, rank, world_size) for rank in range(world_size)]
    np.testing.assert_array_equal(np.concatenate(parts), batch)
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("num_samples", "val_size", "held"), [(1000, 100, 100), (1000, 5000, 200), (4, 10, 0)])
def test_hold_out_is_fixed_and_takes_a_fifth_at_most(num_samples: int, val_size: int, held: int) -> None:
    source = ArraySource(np.zeros((num_samples, 2, 2)))
    train, val = hold_out(source, val_size)
    assert len(val) == held
    assert sorted([*train, *val]) == list(range(num_samples))
    assert (np.diff(train) > 0).all()
    assert (np.diff(val) > 0).all()
    np.testing.assert_array_equal(hold_out(source, val_size)[1], val)
