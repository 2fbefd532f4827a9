"""Batches on the device: of images held in memory, or read by worker processes."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from torchmae.data.arrays import Held
from torchmae.data.plan import Indices, Plan, shard
from torchmae.data.reading import BadFiles
from torchmae.data.sources import Source
from torchmae.data.transforms import Normalisation, mirror, normalise, resample, to_device
from torchmae.data.worker import (
    Fetched,
    Reader,
    Request,
    Slots,
    View,
    boxes_of,
    crop_numbers,
    draw_flips,
    labels_of,
    start_worker,
)
from torchmae.errors import DataError
from torchmae.random import permutation


@dataclass(frozen=True)
class Batch:
    """Images for the model.

    Attributes:
        images: (B, C, *input_size) float32, normalised, on the device.
        labels: (B,) int64 on the device, -1 where unknown.
        indices: (B,) which images of the loader these are.
        epoch: the epoch they were drawn in, one for all or, with data.repeats, (B,); 0 in evaluation.
    """

    images: Tensor
    labels: Tensor
    indices: Indices
    epoch: int | Indices


class ImageLoader:
    """Batches of one set of images.

    What a batch holds is a function of the plan (or the indices) alone: neither the number of workers, nor the
    step that iteration starts at, nor where images are held (but for rounding, and for JPEGs much larger than the
    crop, which workers decode at a fraction of their size: see `transforms.reduction`) changes it.

    Args:
        source: the images.
        held: the same images in memory, the processor's or the device's; None: they are read by worker processes.
        view: how they become the model's input.
        normalisation: how stored values become the model's input.
        device: where batches go.
        num_workers: processes that read, where images are not held; 0: this one.
        bad: takes the images that cannot be read.
        repeats: as in DataConfig.
    """

    def __init__(
        self,
        source: Source,
        held: Held | None,
        *,
        view: View,
        normalisation: Normalisation,
        device: torch.device,
        num_workers: int,
        bad: BadFiles,
        repeats: int = 1,
    ) -> None:
        self.source = source
        self.labels = source.labels if held is None else held.labels
        self._held = held
        self._view = view
        self.normalisation = normalisation
        self._mean = torch.tensor(normalisation.mean, device=device)
        self._std = torch.tensor(normalisation.std, device=device)
        self._device = device
        self._num_workers = num_workers
        self._bad = bad
        self._repeats = repeats
        self._side: torch.cuda.Stream | None = None
        self._running: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()

    def __len__(self) -> int:
        return len(self.source)

    @property
    def in_memory(self) -> bool:
        """Whether the images are held in memory."""
        return self._held is not None

    def train_batches(
        self, plan: Plan, start: int, stop: int, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """This rank's part of the batches of steps `start` to `stop - 1`, randomly cropped and flipped.

        Raises:
            DataError: more unreadable images than allowed; when their batch is due.
        """

        def requests() -> Iterator[Request]:
            planned = map(plan.indices, range(start, stop))
            for epoch, indices in planned if self._repeats == 1 else repeated(plan, start, stop, self._repeats):
                mine = epoch if isinstance(epoch, int) else shard(epoch, rank, world_size)
                yield Request(shard(indices, rank, world_size), plan.seed, mine)

        return self._batches(requests(), stop - start)

    def eval_batches(self, indices: Indices, batch_size: int) -> Iterator[Batch]:
        """Images in the order given: the largest centred box with the input's proportions, not flipped.

        Raises:
            DataError: more unreadable images than allowed; when their batch is due.
        """
        starts = range(0, len(indices), batch_size)
        return self._batches((Request(indices[i : i + batch_size], None, 0) for i in starts), len(starts))

    def close(self) -> None:
        """Ends whatever iterations are under way, and their worker processes."""
        for running in list(self._running):
            running.close()

    def _batches(self, requests: Iterator[Request], count: int) -> Iterator[Batch]:
        batches = self._from_memory(requests, self._held) if self._held else self._from_workers(requests, count)
        self._running.add(batches)
        return batches

    def _from_memory(self, requests: Iterator[Request], held: Held) -> Generator[Batch, None, None]:
        size = tuple(held.images.shape[2:])
        one = self.normalisation.one(held.images.dtype)
        for request in requests:
            boxes, flips = boxes_of(crop_numbers(request), size, self._view), draw_flips(request, self._view)
            images = resample(
                to_device(held.gather(request.indices), self._device), boxes, self._view.input_size, flips
            )
            labels = to_device(labels_of(held.labels, request.indices), self._device)
            yield self._batch(images, one, labels, request)

    def _from_workers(self, requests: Iterator[Request], count: int) -> Generator[Batch, None, None]:
        asked: list[Request] = []

        def noted() -> Iterator[Request]:
            for request in requests:
                asked.append(request)
                yield request

        workers = min(self._num_workers, count)
        # Copies to other devices may still be under way when their slot is given back; CUDA's are from pinned copies.
        slots = Slots(workers if self._device.type in ("cpu", "cuda") else 0)
        loader = DataLoader(
            Reader(self.source, len(self._mean), self._view, slots, self.normalisation.scale),
            sampler=noted(),
            batch_size=None,  # the reader makes whole batches
            collate_fn=_as_it_is,
            num_workers=workers,
            worker_init_fn=start_worker,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # else starting workers would advance the global one
        )
        for fetched, images, labels in self._sent(_survivors(loader)):
            for name, reason in fetched.bad:
                self._bad.add(name, reason)
            if fetched.failure is not None:
                raise DataError(fetched.failure)
            request = asked.pop(0)
            mirrored = to_device(torch.from_numpy(np.flatnonzero(draw_flips(request, self._view))), self._device)
            images = mirror(images, mirrored).movedim(-1, 1)
            batch = self._batch(images, self.normalisation.one(fetched.images.dtype), labels, request)
            slots.give_back(fetched.slot)
            yield batch

    def _sent(self, batches: Iterator[Fetched]) -> Iterator[tuple[Fetched, Tensor, Tensor]]:
        """Each batch with its images and labels on the device; on CUDA, the next one is on its way there by then."""
        if self._device.type != "cuda":
            yield from ((item, *self._on_device(item)) for item in batches)
            return
        if self._side is None:  # one for all: what is freed on a stream serves that stream alone
            self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        under_way: deque[tuple[Fetched, Tensor, Tensor, torch.cuda.Event]] = deque()
        for item in chain(batches, [None]):
            if item is not None:
                with torch.cuda.stream(self._side):
                    under_way.append((item, *self._on_device(item), self._side.record_event()))
            if len(under_way) == 2 or (item is None and under_way):
                fetched, images, labels, copied = under_way.popleft()
                current = torch.cuda.current_stream(self._device)
                current.wait_event(copied)
                images.record_stream(current)  # else the side stream would reuse their memory too early
                labels.record_stream(current)
                yield fetched, images, labels

    def _on_device(self, item: Fetched) -> tuple[Tensor, Tensor]:
        return to_device(item.images, self._device), to_device(item.labels, self._device)

    def _batch(self, images: Tensor, one: float, labels: Tensor, request: Request) -> Batch:
        normalised = normalise(images, self._mean, self._std, one)
        return Batch(normalised, labels, request.indices, request.epoch)


def repeated(plan: Plan, start: int, stop: int, repeats: int) -> Iterator[tuple[Indices, Indices]]:
    """The epochs and indices, (B,) each, of steps whose images come in runs of `repeats` views (repeated sampling).

    Epochs form groups of `repeats`. A group goes once through the images, in the order of its first epoch, and takes
    of each the views (crop, flip, mask) that it would have in every epoch of the group, one after the other. So
    steps, batch sizes and what is drawn for (epoch, index) are the plan's, and at the end of a group every image was
    seen as often; only which views share a batch differs. A run that a batch's end cuts is decoded in both.

    Args:
        plan: of the run without repeats.
        start: first step.
        stop: the step after the last.
        repeats: views of an image that follow each other.
    """
    group, order = -1, np.empty(0, dtype=np.int64)
    for step in range(start, stop):
        epoch, position = divmod(step, plan.steps_per_epoch)
        if epoch // repeats != group:
            group = epoch // repeats
            order = permutation(plan.seed, group * repeats, plan.num_samples)
        first = position * plan.batch_size
        in_epoch = np.arange(first, min(first + plan.batch_size, plan.num_samples))
        views = epoch % repeats * plan.num_samples + in_epoch
        yield group * repeats + views % repeats, order[views // repeats]


@contextmanager
def one_line_when_a_worker_ends() -> Iterator[None]:
    """The unexpected end of a process that reads images as one line; other errors as they are.

    The loader's own iterations have it. It belongs around what is done with their batches too, for PyTorch raises from
    the signal that tells of a child's end, wherever the main process is by then, such as in the middle of a step.

    Raises:
        DataError: it names the process and what ended it.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that reads images ended unexpectedly ({' '.join(str(error).split())[:100]})",
            "most often memory ran out: lower data.num_workers or batch_size",
        ) from error


def _survivors(loader: DataLoader[Fetched]) -> Iterator[Fetched]:
    with one_line_when_a_worker_ends():
        batches = iter(loader)
        try:
            yield from batches
        finally:
            _end(batches)


def _end(batches: Any) -> None:
    """Ends the workers of an iteration, if it has any, and one whose read hangs (a file server that is gone) too.

    PyTorch ends them when the iteration is freed, which a traceback may put off: it asks them, waits for some seconds,
    and sends SIGTERM, which they ignore.
    """
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()
        for worker in batches._workers:
            if worker.is_alive():
                worker.kill()
                worker.join()


def _as_it_is(fetched: Any) -> Any:
    return fetched
