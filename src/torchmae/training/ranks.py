"""Ranks: the processes that train together, each on one GPU, and their collective operations.

`torchrun` starts the ranks and numbers them by environment variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from torchmae.data.reading import reader_processes
from torchmae.errors import ConfigError, TorchmaeError, TrainingError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # the others wait while rank 0 writes a checkpoint to a slow disk, or draws pictures
MEETING = timedelta(minutes=5)  # all ranks have to be started within this time


@dataclass(frozen=True)
class Ranks:
    """This process's rank, and collective operations.

    All ranks call a method in the same order, and all get the same result. With one rank, nothing is sent.

    Attributes:
        rank: 0 to world_size - 1; rank 0 writes files, prints and logs.
        world_size: number of ranks on all machines.
        local_rank: rank on this machine, and the index of its GPU.
        local_world_size: number of ranks on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place; does not wait for the tensor's device."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def all_reduce_max(self, *values: float) -> list[float]:
        """The maximum of each value over all ranks; does not wait for a GPU."""
        if self.world_size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return numbers.tolist()

    def on_main(self, action: Callable[[], T]) -> T:
        """Runs `action` on rank 0 and returns its result on all ranks; if it fails, other ranks raise SystemExit."""
        if self.world_size == 1:
            return action()
        answer: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_main:
            try:
                answer[0] = action()
            except Exception as caught:
                error = caught
                answer[1] = getattr(caught, "exit_status", 1)
        dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
        if error is not None:
            raise error
        if answer[1] is not None:
            raise SystemExit(answer[1])
        return answer[0]

    def together(self, action: Callable[[], T]) -> T:
        """Runs `action`, which must not communicate, on every rank; if it fails on one rank, all ranks end.

        Raises:
            TorchmaeError: on rank 0, the error of the first rank that failed; other ranks raise SystemExit.
        """
        error: TorchmaeError | None = None
        try:
            found = action()
        except TorchmaeError as caught:
            error = caught
        failures = self.gather(None if error is None else (error.problem, error.fix, error.exit_status))
        rank, failure = next(((i, item) for i, item in enumerate(failures) if item is not None), (0, None))
        if failure is None:
            return found
        if not self.is_main:
            raise SystemExit(failure[2])
        raise error if error is not None else ConfigError(f"rank {rank}: {failure[0]}", failure[1])

    def main_first(self, action: Callable[[], T]) -> T:
        """Runs `action` on rank 0, then on the others: downloads and indexes are made once. Errors as in `on_main`."""
        found: list[T] = []
        self.on_main(lambda: found.append(action()))
        return found[0] if self.is_main else action()

    def share(self, count: int) -> range:
        """This rank's contiguous part of `range(count)`; the last rank has the largest part."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Joins the rows of all ranks, (M, ...) each, in the order of ranks: (N, ...). Only M may differ."""
        if self.world_size == 1:
            return rows
        counts = self.gather(len(rows))
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        everything = rows.new_empty(self.world_size, *padded.shape)
        dist.all_gather(list(everything), padded)
        return torch.cat([part[:count] for part, count in zip(everything, counts, strict=True)])

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


ALONE = Ranks()


@contextmanager
def one_line_when_lost(ranks: Ranks, kept: str = "the last checkpoint was kept: resume the run") -> Iterator[None]:
    """Converts a failed collective into a one-line TrainingError; `kept` is the end of its fix."""
    try:
        yield
    except RuntimeError as error:
        if ranks.world_size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise TrainingError(
            f"rank {ranks.rank} lost another ({' '.join(str(error).split())[:120]})",
            f"what that one said last tells why; {kept}",
        ) from error


def ranks_from_environment() -> Ranks:
    """Reads torchrun's variables; without them there is one rank. ConfigError if only some of them are set."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if given.get("WORLD_SIZE", "1") == "1" and len(given) < len(names):
        return ALONE
    for name in names:
        if not given.get(name, "").isdecimal():
            raise ConfigError(
                f"WORLD_SIZE is {given.get('WORLD_SIZE')!r} and {name} is {given.get(name, 'not set')!r}",
                "start ranks with torchrun, which sets them all, or unset WORLD_SIZE to train alone",
            )
    return Ranks(*(int(given[name]) for name in names))


def restarts() -> tuple[int, int]:
    """The number of times that torchrun has restarted the ranks, and its limit (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))


@contextmanager
def open_ranks(device: str) -> Iterator[Ranks]:
    """Connects the ranks that torchrun started, by NCCL for GPUs, gloo for processors, while the context lasts.

    Each rank takes its own GPU, or all share the processor. A process group that the caller opened is used.

    Raises:
        ConfigError: this machine has fewer GPUs than ranks, or `device` is one GPU for all ranks.
    """
    ranks = ranks_from_environment()
    if ranks.world_size == 1:
        yield ranks
        return
    with_gpus = check_device(device, ranks, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if dist.is_initialized():
        yield ranks
        return
    if with_gpus:
        torch.cuda.set_device(ranks.local_rank)
    backend = "cpu:gloo,cuda:nccl" if with_gpus else "gloo"
    with one_line_when_lost(ranks, "start all ranks again"):
        dist.init_process_group(
            backend, store=meet(ranks), rank=ranks.rank, world_size=ranks.world_size, timeout=TIMEOUT
        )
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def meet(ranks: Ranks) -> Any:
    """Waits for all ranks and returns the store of the process group; TrainingError after MEETING."""
    try:
        store, _, _ = next(rendezvous("env://", timeout=MEETING))
        # After a restart by torchrun the store still holds the addresses of the ranks that ended.
        attempt = dist.PrefixStore(f"attempt-{restarts()[0]}", store)  # type: ignore[attr-defined]
        attempt.set(f"here-{ranks.rank}", "")
        attempt.wait([f"here-{rank}" for rank in range(ranks.world_size)], MEETING)
    except dist.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        minutes = MEETING.total_seconds() / 60
        raise TrainingError(
            f"rank {ranks.rank} of {ranks.world_size} waited {minutes:g} minutes for the others at {place}",
            "start as many processes as --nnodes times --nproc-per-node; look at the address, the port, the firewall",
        ) from error
    return attempt


def check_device(device: str, ranks: Ranks, num_gpus: int) -> bool:
    """Whether the ranks compute on GPUs; ConfigError if there are fewer GPUs than ranks."""
    if device == "cpu" or (device == "auto" and num_gpus == 0):
        return False
    if device not in ("auto", "cuda"):
        raise ConfigError(f"device is {device!r} with {ranks.world_size} ranks", "use auto, cuda or cpu")
    if ranks.local_world_size > num_gpus:
        raise ConfigError(
            f"{ranks.local_world_size} ranks on a machine with {num_gpus} GPUs",
            f"start torchrun with --nproc-per-node {max(num_gpus, 1)}, or give --device cpu",
        )
    return True


def share_of_cores(num_workers: int | None, ranks: Ranks) -> int | None:
    """Number of DataLoader workers per rank: the option's value, else the rank's share of the cores; None if alone."""
    return num_workers if ranks.local_world_size == 1 else reader_processes(num_workers, ranks.local_world_size)


def concatenate(lists: Sequence[Sequence[T]]) -> list[T]:
    """The distinct items of several lists, in order."""
    return list(dict.fromkeys(item for one in lists for item in one))
