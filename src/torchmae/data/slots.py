"""Memory in which worker processes hand batches over, kept from batch to batch.

PyTorch takes new shared memory for each batch, which the system clears page by page as it is written: an eighth of the
time that a worker needs for a batch of JPEGs on one machine (docs/performance.md). Here each worker has some of its
own, and is told which of it is free again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

PER_WORKER = 4  # two that PyTorch asks for in advance, and two on their way to a GPU


class Slots:
    """Made in the main process, given to its workers.

    Args:
        num_workers: how many there are; with none, there are no slots.
    """

    def __init__(self, num_workers: int) -> None:
        self._taken = torch.zeros(num_workers * PER_WORKER, dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]
        self._memory: dict[int, Tensor] = {}  # a worker's own

    def stack(self, images: Sequence[Tensor]) -> tuple[Tensor, int | None]:
        """In a worker: the images as one batch, and its slot.

        Args:
            images: (*size) each, of one type.

        Returns:
            (B, *size), and what to call `give_back` with when it was copied; None: in memory of its own, since this is
            no worker or none of its slots is free.
        """
        slot = self._take()
        if slot is None:
            return torch.stack(list(images)), None
        first = images[0]
        num_bytes = len(images) * first.nbytes
        if slot not in self._memory or self._memory[slot].nbytes < num_bytes:
            self._memory[slot] = torch.empty(num_bytes, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
        batch = self._memory[slot][:num_bytes].view(first.dtype).view(len(images), *first.shape)
        torch.stack(list(images), out=batch)
        return batch, slot

    def give_back(self, slot: int | None) -> None:
        """In the main process: what the slot holds was copied, and may be written over."""
        if slot is not None:
            self._taken[slot] = False

    def _take(self) -> int | None:
        worker = get_worker_info()
        if worker is None:
            return None
        own = range(worker.id * PER_WORKER, (worker.id + 1) * PER_WORKER)
        slot = next((slot for slot in own if not self._taken[slot]), None)
        if slot is not None:
            self._taken[slot] = True
        return slot
