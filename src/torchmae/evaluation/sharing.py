"""Evaluation on several ranks: each rank computes on a share of the images, and all ranks get all results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from torchmae.data.loader import Indices
from torchmae.evaluation.scores import Labelled
from torchmae.training.ranks import ALONE, Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One rank's share of the images.

    Attributes:
        rows: the rank's images, in order; the last one may be padding, a batch of its own.
        num_batches: number of batches without the padding.
        ranks: the group that shares the images.
    """

    rows: Indices
    num_batches: int
    ranks: Ranks = ALONE

    def of_this_rank(self, *values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """This rank's values, (M, ...), from (B, ...) for each of its batches."""
        count = sum(map(len, values[0][: self.num_batches]))
        return tuple(torch.cat(list(value))[:count] for value in values)

    def of_all_images(self, *values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All ranks' values, (N, ...) in the order of the images, from this rank's (B, ...) for each of its batches."""
        return tuple(map(self.ranks.gather_rows, self.of_this_rank(*values)))

    def of_all_batches(self, values: Sequence[T]) -> list[T]:
        """All ranks' values, in the order of the batches, from one small value for each of this rank's batches."""
        return [value for part in self.ranks.gather(list(values[: self.num_batches])) for value in part]


def share(rows: Indices, size: int, ranks: Ranks) -> Share:
    """This rank's share of images: whole batches of `size`, the same batches that a single rank would make.

    All ranks get the same number of batches, because ranks that hold parts of one model (FSDP2) must compute together:
    a rank with one batch less gets padding, a batch of one image that does not count.
    """
    batches = -(-len(rows) // size)
    mine = ranks.share(batches)
    own = rows[mine.start * size : mine.stop * size]
    even = len(mine) == -(-batches // ranks.world_size)
    return Share(own if even else np.concatenate([own, rows[:1]]), len(mine), ranks)


class Parts(NamedTuple):
    """How training images are divided: among ranks, of which each holds a part, and into groups.

    `groups` are (M,) int64 for this rank's M images: images of one group belong together, as those of a patient do.
    """

    groups: Tensor | None = None
    ranks: Ranks = ALONE

    def whole(self, train: Labelled) -> Labelled:
        """The images of all ranks, on every rank."""
        return Labelled(*map(self.ranks.gather_rows, train))

    def all_groups(self) -> Indices | None:
        """The groups of all ranks' images."""
        return None if self.groups is None else self.ranks.gather_rows(self.groups).cpu().numpy()

    def of_this_rank(self, rows: Indices, count: int) -> Tensor:
        """Of rising `rows` of all ranks' images, those among this rank's `count`, as rows of its part."""
        start = sum(self.ranks.gather(count)[: self.ranks.rank])
        return torch.from_numpy(rows[(rows >= start) & (rows < start + count)] - start)


WHOLE = Parts()
"""All images on one rank, each a group of its own."""
