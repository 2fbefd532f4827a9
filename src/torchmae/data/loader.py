"""Batches on the device: which samples make up which step, held in memory or read by worker processes."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from torchmae.data.arrays import Held
from torchmae.data.reading import BadFiles
from torchmae.data.sources import Source
from torchmae.data.transforms import Normalisation, mirror, normalise, resample, to_device
from torchmae.data.worker import (
    Fetched,
    Indices,
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
from torchmae.errors import DataError, reason_of
from torchmae.random import Purpose, permutation

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """The order of a run: every sample once an epoch, in an order of the epoch's own.

    `batch_size` is that of a step over all ranks; `seed` is of the order. The last batch of an epoch has the images
    that are left; the official MAE code drops it.
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
    """Rank's contiguous part of a global batch; sizes differ by one at most, and may be 0."""
    return indices[len(indices) * rank // world_size : len(indices) * (rank + 1) // world_size]


def mixed_subset(length: int, count: int) -> Indices:
    """At most `count` indices below `length`: the same ones each time, in an order that mixes classes."""
    return permutation(0, 0, length, Purpose.SUBSET)[:count]


def hold_out(num_samples: int, val_size: int) -> tuple[Indices, Indices]:
    """Sorted training and validation indices (at most a fifth), the same whatever the seed of the run."""
    order = permutation(0, 0, num_samples, Purpose.HOLD_OUT)
    count = min(val_size, num_samples // 5)
    return np.sort(order[count:]), np.sort(order[:count])


@dataclass(frozen=True)
class Batch:
    """Images for the model."""

    images: Tensor  # (B, C, *input_size) float32, normalised, on the device
    labels: Tensor  # (B,) int64 on the device, -1 where unknown
    indices: Indices  # (B,) which images of the loader these are
    epoch: int | Indices  # that they were drawn in, one for all or, with data.repeats, (B,); 0 in evaluation


@dataclass(eq=False)
class ImageLoader:
    """Batches of one set of images.

    The plan (or the indices) alone decides what a batch holds: neither the number of workers, nor the step that
    iteration starts at, nor where images are held changes it. Exceptions are rounding, and JPEGs much larger than the
    crop, which workers decode at a fraction of their size (`transforms.reduction`).
    """

    source: Source
    held: Held | None  # the same images in memory, the processor's or the device's; None: workers read them
    _: KW_ONLY
    view: View
    normalisation: Normalisation
    device: torch.device
    num_workers: int  # processes that read, where images are not held; 0: this one
    bad: BadFiles  # takes the images that cannot be read
    repeats: int = 1  # as in DataConfig

    def __post_init__(self) -> None:
        self.labels = self.source.labels if self.held is None else self.held.labels
        self._mean = torch.tensor(self.normalisation.mean, device=self.device)
        self._std = torch.tensor(self.normalisation.std, device=self.device)
        self._side: torch.cuda.Stream | None = None
        self._running: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()

    def __len__(self) -> int:
        return len(self.source)

    @property
    def in_memory(self) -> bool:
        """Whether the images are held in memory."""
        return self.held is not None

    def train_batches(
        self, plan: Plan, start: int, stop: int, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """This rank's part of the batches of steps `start` to `stop - 1`, randomly cropped and flipped.

        DataError, when their batch is due: more unreadable images than allowed.
        """

        def requests() -> Iterator[Request]:
            planned = map(plan.indices, range(start, stop))
            for epoch, indices in planned if self.repeats == 1 else repeated(plan, start, stop, self.repeats):
                mine = epoch if isinstance(epoch, int) else shard(epoch, rank, world_size)
                yield Request(shard(indices, rank, world_size), plan.seed, mine)

        return self._batches(requests(), stop - start, self._batch)

    def eval_batches(self, indices: Indices, batch_size: int) -> Iterator[Batch]:
        """Images in the order given: the largest centred box, not flipped; errors as of `train_batches`."""
        return self._eval_batches(indices, batch_size, self._batch)

    def kept_batches(self, indices: Indices, batch_size: int) -> Callable[[], Iterator[Batch]]:
        """Reads `eval_batches` once; what is returned gives them again and again.

        They are kept in the processor's memory, in the type that the images are stored in: often a quarter of float32.
        """

        def keep(images: Tensor, dtype: torch.dtype, *others: Any) -> tuple[Any, ...]:
            return images.cpu().to(dtype, copy=True), dtype, *others  # exact: resampled integers are rounded

        kept = list(self._eval_batches(indices, batch_size, keep))
        return lambda: (self._batch(to_device(item[0], self.device), *item[1:]) for item in kept)

    def close(self) -> None:
        """Ends whatever iterations are under way, and their worker processes."""
        for running in list(self._running):
            running.close()

    def _eval_batches(self, indices: Indices, batch_size: int, finish: Callable[..., T]) -> Iterator[T]:
        starts = range(0, len(indices), batch_size)
        return self._batches((Request(indices[i : i + batch_size], None, 0) for i in starts), len(starts), finish)

    def _batches(self, requests: Iterator[Request], count: int, finish: Callable[..., T]) -> Iterator[T]:
        """What `finish` makes of each batch: images before normalisation, their stored type, labels, request."""
        if self.held is None:
            batches = self._from_workers(requests, count, finish)
        else:
            batches = self._from_memory(requests, self.held, finish)
        self._running.add(batches)
        return batches

    def _from_memory(
        self, requests: Iterator[Request], held: Held, finish: Callable[..., T]
    ) -> Generator[T, None, None]:
        for request in requests:
            images = to_device(held.gather(request.indices), self.device)
            boxes = boxes_of(crop_numbers(request), tuple(images.shape[2:]), self.view)
            images = resample(images, boxes, self.view.input_size, draw_flips(request, self.view))
            labels = to_device(labels_of(held.labels, request.indices), self.device)
            yield finish(images, held.images.dtype, labels, request)

    def _from_workers(
        self, requests: Iterator[Request], count: int, finish: Callable[..., T]
    ) -> Generator[T, None, None]:
        asked: deque[Request] = deque()

        def noted() -> Iterator[Request]:
            for request in requests:
                asked.append(request)
                yield request

        workers = min(self.num_workers, count)
        # Copies to other devices may still be under way when their slot is given back; CUDA's are from pinned copies.
        slots = Slots(workers if self.device.type in ("cpu", "cuda") else 0)
        loader = DataLoader(
            Reader(self.source, len(self._mean), self.view, slots, self.normalisation.scale),
            sampler=noted(),
            batch_size=None,  # the reader makes whole batches
            num_workers=workers,
            worker_init_fn=start_worker,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else starting workers would advance the global one
        )
        for fetched, images, labels in self._sent(_survivors(loader)):
            for name, reason in fetched.bad:
                self.bad.add(name, reason)
            if fetched.failure is not None:
                raise DataError(fetched.failure)
            request = asked.popleft()
            mirrored = to_device(torch.from_numpy(np.flatnonzero(draw_flips(request, self.view))), self.device)
            images = mirror(images, mirrored).movedim(-1, 1)
            batch = finish(images, fetched.images.dtype, labels, request)
            slots.give_back(fetched.slot)
            yield batch

    def _sent(self, batches: Iterator[Fetched]) -> Iterator[tuple[Fetched, Tensor, Tensor]]:
        """Each batch with its images and labels on the device; on CUDA, the next one is on its way there by then."""
        if self.device.type != "cuda":
            yield from ((item, item.images.to(self.device), item.labels.to(self.device)) for item in batches)
            return
        if self._side is None:  # one for all: what is freed on a stream serves that stream alone
            self._side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        under_way: deque[tuple[Fetched, Tensor, Tensor, torch.cuda.Event]] = deque()
        for item in chain(batches, [None]):
            if item is not None:
                with torch.cuda.stream(self._side):
                    images, labels = (to_device(tensor, self.device) for tensor in (item.images, item.labels))
                    under_way.append((item, images, labels, self._side.record_event()))
            if len(under_way) == 2 or (item is None and under_way):
                fetched, images, labels, copied = under_way.popleft()
                current = torch.cuda.current_stream(self.device)
                current.wait_event(copied)
                images.record_stream(current)  # else the side stream would reuse their memory too early
                labels.record_stream(current)
                yield fetched, images, labels

    def _batch(self, images: Tensor, dtype: torch.dtype, labels: Tensor, request: Request) -> Batch:
        normalised = normalise(images, self._mean, self._std, self.normalisation.one(dtype))
        return Batch(normalised, labels, request.indices, request.epoch)


def repeated(plan: Plan, start: int, stop: int, repeats: int) -> Iterator[tuple[Indices, Indices]]:
    """Repeated augmentation: epochs and indices, (B,) each, of steps where `repeats` views of an image come in a run.

    Epochs form groups of `repeats`. A group goes once through the images, in the order of its first epoch, and takes
    of each the views (crop, flip, mask) that it would have in every epoch of the group, one after the other. So
    steps, batch sizes and what is drawn for (epoch, index) are the plan's, and at the end of a group every image was
    seen as often; only which views share a batch differs. A run that a batch's end cuts is decoded in both.
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
    """The unexpected end of a process that reads images becomes a DataError of one line; other errors stay.

    The loader's own iterations have it. It belongs around what is done with their batches too: PyTorch raises from the
    signal that tells of a child's end, wherever the main process is by then, such as in the middle of a step.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that reads images ended unexpectedly ({reason_of(error)[:100]})",
            "most often memory ran out: lower data.num_workers or batch_size",
        ) from error


def _survivors(loader: DataLoader[Fetched]) -> Iterator[Fetched]:
    """The batches of one iteration, at whose end its workers end, and one whose read hangs (a lost file server) too.

    PyTorch ends them when the iteration is freed, which a traceback may put off: it asks them, waits for some seconds,
    and sends SIGTERM, which they ignore.
    """
    with one_line_when_a_worker_ends():
        batches: Any = iter(loader)
        try:
            yield from batches
        finally:
            if hasattr(batches, "_shutdown_workers"):
                batches._shutdown_workers()
                for worker in batches._workers:
                    if worker.is_alive():
                        worker.kill()
                        worker.join()
