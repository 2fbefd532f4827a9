from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmae.random import Purpose, bits, permutation, philox, uniform

seeds = st.integers(0, 2**64 - 1)
epochs = st.integers(0, 2**32 - 1)
purposes = st.sampled_from(Purpose)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_its_authors_known_answers(counter: str, key: str, words: str) -> None:
    # Random123's kat_vectors, philox4x32-10.
    start = np.array([int(word, 16) for word in counter.split()], dtype=np.uint64)
    k0, k1 = (int(word, 16) for word in key.split())
    wanted = [int(word, 16) for word in words.split()]
    assert philox(start, (k0, k1)).tolist() == wanted
    assert philox(np.tile(start[:, None, None], (1, 2, 3)), (k0, k1))[:, 1, 2].tolist() == wanted


@given(seed=seeds, epoch=epochs, index=st.integers(0, 2**32 - 1), purpose=purposes)
def test_bits_are_philox_of_block_index_epoch_and_purpose(seed: int, epoch: int, index: int, purpose: Purpose) -> None:
    words = bits(seed, epoch, index, purpose, 6)
    assert words.shape == (1, 6)
    for k in range(6):
        counter = np.array([k // 4, index, epoch, purpose], dtype=np.uint64)
        assert words[0, k] == philox(counter, (seed % 2**32, seed >> 32))[k % 4]


def test_the_purposes_numbers_never_change() -> None:
    numbers = {"ORDER": 0, "CROP": 1, "FLIP": 2, "MASK": 3, "HOLD_OUT": 4, "SUBSET": 5}
    assert {name: Purpose[name].value for name in numbers} == numbers
    assert len({purpose.value for purpose in Purpose}) == len(Purpose)


def test_uniform_numbers_that_every_machine_must_give() -> None:
    # A change of these would change what every earlier run's checkpoint resumes to.
    assert (uniform(0, 0, 0, Purpose.ORDER, 4) * 2**24).tolist() == [[6694888, 14772677, 12343212, 10158299]]
    assert permutation(0, 0, 8).tolist() == [4, 2, 0, 5, 1, 7, 6, 3]


def test_uniform_is_uniform() -> None:
    values = uniform(11, 3, np.arange(500), Purpose.CROP, 200).astype(np.float64)
    assert values.shape == (500, 200)
    assert values.min() >= 0
    assert values.max() < 1
    number = values.size
    assert values.mean() == pytest.approx(0.5, abs=5 * (1 / 12 / number) ** 0.5)
    assert values.var() == pytest.approx(1 / 12, abs=5 * (1 / 180 / number) ** 0.5)
    counts = np.histogram(values, bins=64, range=(0, 1))[0]
    assert ((counts - number / 64) ** 2 / (number / 64)).sum() < 63 + 5 * (2 * 63) ** 0.5
    # Neighbours, along an index and from one index to the next, are not correlated.
    for left, right in ((values[:, 1:], values[:, :-1]), (values[1:], values[:-1])):
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 5 / left.size**0.5


def test_uniform_is_below_one_at_the_largest_word() -> None:
    assert np.float32(2**24 - 1) * np.float32(2.0**-24) < 1
    values = uniform(0, 0, np.arange(1000), Purpose.MASK, 100)
    assert values.dtype == np.float32
    assert (values * 2**24 == np.floor(values * 2**24)).all()


@given(seed=seeds, epoch=epochs, purpose=purposes, data=st.data())
def test_an_index_has_its_numbers_whatever_else_is_asked(
    seed: int, epoch: int, purpose: Purpose, data: st.DataObject
) -> None:
    indices = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6))
    count = data.draw(st.integers(1, 9))
    more = data.draw(st.integers(count, 12))
    together = uniform(seed, epoch, np.array(indices), purpose, count)
    assert together.shape == (len(indices), count)
    for row, index in zip(together, indices, strict=True):
        assert np.array_equal(row, uniform(seed, epoch, index, purpose, count)[0])
        assert np.array_equal(row, uniform(seed, epoch, index, purpose, more)[0, :count])


def test_seed_epoch_index_and_purpose_each_change_the_numbers() -> None:
    asked = [
        (seed, epoch, index, purpose)
        for seed in (0, 1, 2**32, 2**63)
        for epoch in (0, 1)
        for index in (0, 1)
        for purpose in Purpose
    ]
    streams = {tuple(bits(*which, 4)[0].tolist()) for which in asked}
    assert len(streams) == len(asked)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_indices_of_any_integer_type(dtype: type[np.integer]) -> None:
    indices = np.array([3, 500], dtype=dtype)
    assert np.array_equal(bits(1, 2, indices, Purpose.FLIP, 3), bits(1, 2, np.array([3, 500]), Purpose.FLIP, 3))


def test_nothing_asked_nothing_given() -> None:
    assert uniform(0, 0, np.array([], dtype=np.int64), Purpose.MASK, 5).shape == (0, 5)
    assert uniform(0, 0, np.arange(3), Purpose.MASK, 0).shape == (3, 0)
    assert permutation(0, 0, 0).shape == (0,)


@given(seed=seeds, epoch=epochs, length=st.integers(1, 300))
def test_a_permutation_has_each_index_once(seed: int, epoch: int, length: int) -> None:
    order = permutation(seed, epoch, length)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(length))
    assert np.array_equal(order, permutation(seed, epoch, length))


def test_permutations_differ_and_have_no_favourites() -> None:
    orders = np.stack([permutation(5, epoch, 10) for epoch in range(4000)])
    assert len({tuple(order) for order in orders.tolist()}) > 3900
    assert not np.array_equal(permutation(5, 0, 100), permutation(6, 0, 100))
    assert not np.array_equal(permutation(5, 0, 100), permutation(5, 0, 100, Purpose.SUBSET))
    for place in range(10):
        counts = np.bincount(orders[:, place], minlength=10)
        assert np.abs(counts - 400).max() < 5 * (4000 * 0.1 * 0.9) ** 0.5
