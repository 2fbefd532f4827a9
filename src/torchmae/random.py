"""Counter-based random numbers: the same (seed, epoch, index, purpose) gives the same bits on any machine.

No generator has a state. A resumed run needs only a step number, and the numbers of workers and ranks do not change
sample i in epoch e.

Source: Philox4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10
_AT_A_TIME = 2**15  # indices of a permutation: intermediate values stay in the processor's cache


class Purpose(IntEnum):
    """The purpose of a stream of random numbers. A number never changes its meaning."""

    ORDER = 0
    CROP = 1
    FLIP = 2
    MASK = 3
    HOLD_OUT = 4
    SUBSET = 5
    BOOTSTRAP = 6
    VIEW = 7


def philox(counter: npt.NDArray[np.uint64], key: tuple[int, int]) -> npt.NDArray[np.uint64]:
    """Ten rounds of Philox4x32: `counter` (4, ...) to (4, ...); these and the two keys are words below 2**32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0 = _MULTIPLIER_0 * c0
        product_1 = _MULTIPLIER_1 * c2
        c0 = (product_1 >> _HALF) ^ c1 ^ np.uint64(k0)
        c1 = product_1 & _LOW
        c2 = (product_0 >> _HALF) ^ c3 ^ np.uint64(k1)
        c3 = product_0 & _LOW
        k0 = (k0 + _WEYL_0) & 0xFFFFFFFF
        k1 = (k1 + _WEYL_1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def bits(
    seed: int,
    epoch: npt.NDArray[np.integer] | int,
    indices: npt.NDArray[np.integer] | int,
    purpose: Purpose,
    count: int,
) -> npt.NDArray[np.uint64]:
    """`count` random words for each index: (N, count), below 2**32.

    `seed` is 0 to 2**64 - 1, `indices` (N,) or one index below 2**32, `epoch` (N,) or one for all indices, below 2**32.
    """
    index = np.atleast_1d(np.asarray(indices)).astype(np.uint64)
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    counter = np.empty((4, len(index), len(blocks)), dtype=np.uint64)
    counter[0] = blocks[None, :]
    counter[1] = index[:, None]
    counter[2] = np.asarray(epoch).astype(np.uint64).reshape(-1, 1)
    counter[3] = np.uint64(int(purpose))
    words = philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return words.transpose(1, 2, 0).reshape(len(index), 4 * len(blocks))[:, :count]


def uniform(
    seed: int,
    epoch: npt.NDArray[np.integer] | int,
    indices: npt.NDArray[np.integer] | int,
    purpose: Purpose,
    count: int,
) -> npt.NDArray[np.float32]:
    """`count` numbers in [0, 1) for each index: (N, count) float32, multiples of 2**-24. Arguments as for `bits`."""
    top_24 = bits(seed, epoch, indices, purpose, count) >> np.uint64(8)
    return (top_24.astype(np.float32)) * np.float32(2.0**-24)


def permutation(seed: int, epoch: int, length: int, purpose: Purpose = Purpose.ORDER) -> npt.NDArray[np.int64]:
    """A random permutation of 0 .. length - 1: (length,) int64.

    Samples are sorted by 64-bit random keys; equal keys (chance below 1e-7 for a million samples) keep index order.
    """
    keys = np.empty(length, dtype=np.uint64)
    for start in range(0, length, _AT_A_TIME):
        words = bits(seed, epoch, np.arange(start, min(start + _AT_A_TIME, length)), purpose, 2)
        keys[start : start + _AT_A_TIME] = (words[:, 0] << np.uint64(32)) | words[:, 1]
    return np.argsort(keys, kind="stable").astype(np.int64)
