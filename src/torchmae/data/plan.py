"""Which samples make up which step: (seed, epoch, step, rank) to indices. Knows nothing of files."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from torchmae.random import Purpose, permutation

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """The order of a run: every sample once an epoch, in an order of the epoch's own.

    Attributes:
        num_samples: samples in the training set, at least 1.
        batch_size: samples per step over all ranks; the last step of an epoch takes what is left.
        seed: of the order.
    """

    num_samples: int
    batch_size: int
    seed: int
    _orders: dict[int, Indices] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.num_samples >= 1
        assert self.batch_size >= 1

    @property
    def steps_per_epoch(self) -> int:
        """Steps that one pass over the samples takes."""
        return -(-self.num_samples // self.batch_size)

    def indices(self, step: int) -> tuple[int, Indices]:
        """The epoch that global step `step` (from 0) belongs to, and the samples of its global batch: (B,) int64."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch not in self._orders:
            while len(self._orders) > 1:  # two, since images are read ahead: those of a million samples are 16 MB
                self._orders.pop(min(self._orders))
            self._orders[epoch] = permutation(self.seed, epoch, self.num_samples)
        start = position * self.batch_size
        return epoch, self._orders[epoch][start : start + self.batch_size]


def shard(indices: Indices, rank: int, world_size: int) -> Indices:
    """Rank's contiguous part of a global batch.

    Sizes differ by one at most, and the parts of all ranks, one after the other, are the batch. A batch smaller
    than `world_size` leaves some ranks with none.
    """
    return indices[len(indices) * rank // world_size : len(indices) * (rank + 1) // world_size]


def hold_out(num_samples: int, val_size: int) -> tuple[Indices, Indices]:
    """Splits samples into training and validation, the same way whatever the seed of the run.

    Args:
        num_samples: how many there are.
        val_size: how many to hold out; at most a fifth of them are.

    Returns:
        training and validation indices, each sorted.
    """
    order = permutation(0, 0, num_samples, Purpose.HOLD_OUT)
    count = min(val_size, num_samples // 5)
    return np.sort(order[count:]), np.sort(order[:count])
