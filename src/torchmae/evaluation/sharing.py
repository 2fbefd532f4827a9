"""Images that are evaluated, divided among ranks: each looks at a share, and all learn what all have found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from torchmae.data.loader import Indices
from torchmae.training.ranks import ALONE, Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One rank's share.

    Attributes:
        rows: the images that it looks at, in order; the last one may be a stand-in.
        num_batches: how many batches count: all but that of a stand-in.
        ranks: among whom the images are divided.
    """

    rows: Indices
    num_batches: int
    ranks: Ranks = ALONE

    def of_all_images(self, *values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What all ranks have found for their images, (N, ...) each, in the order of all.

        Each of `values` is what this rank has found, (B, ...) for each of its batches.
        """
        count = sum(map(len, values[0][: self.num_batches]))
        return tuple(self.ranks.gather_rows(torch.cat(list(value))[:count]) for value in values)

    def of_all_batches(self, values: Sequence[T]) -> list[T]:
        """What all ranks have found for their batches, in the order of all; from one small value for each of ours."""
        return [value for part in self.ranks.gather(list(values[: self.num_batches])) for value in part]


def share(rows: Indices, size: int, ranks: Ranks) -> Share:
    """This rank's share of some images: whole batches, the same ones that a single rank would make.

    All ranks have as many batches, because those that hold parts of one model (FSDP2) can only compute together. Where
    they do not come out even, some have a stand-in: a batch of one image that does not count.

    Args:
        rows: the images.
        size: of a batch.
        ranks: among whom.
    """
    batches = -(-len(rows) // size)
    mine = ranks.share(batches)
    own = rows[mine.start * size : mine.stop * size]
    even = len(mine) == -(-batches // ranks.world_size)
    return Share(own if even else np.concatenate([own, rows[:1]]), len(mine), ranks)
