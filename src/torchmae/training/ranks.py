"""Ranks: the processes that train together, each on one GPU, and their collective operations.

`torchrun` starts the ranks and numbers them by environment variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE).
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from ipaddress import ip_address
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from torchmae.data.reading import reader_processes
from torchmae.errors import ConfigError, TorchmaeError, TrainingError

T = TypeVar("T")
BEAT = 1.0  # seconds between two signs of life of a rank that the others wait for
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a network interface


@dataclass(frozen=True)
class Ranks:
    """This process's rank, and collective operations.

    All ranks call a method in the same order, and all get the same result. With one rank, nothing is sent.

    Attributes:
        rank: 0 to world_size - 1; rank 0 writes files, prints and logs.
        world_size: number of ranks on all machines.
        local_rank: rank on this machine, and the index of its GPU.
        local_world_size: number of ranks on this machine.
        timeout: minutes that ranks wait for one that neither answers nor gives a sign of life.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    timeout: float = 10.0

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
        with self._signs_of_life():
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
        with self._signs_of_life():
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

    @contextmanager
    def _signs_of_life(self) -> Iterator[None]:
        """Waits at its end until all ranks are there; a rank may take as long as it needs if it lives.

        A thread exchanges signs of life meanwhile, so that the timeout only counts for a rank that gives none.
        """
        if self.world_size == 1:
            yield
            return
        ended = threading.Event()

        def beat() -> None:
            busy = 1.0
            with suppress(RuntimeError):  # a rank is lost, which the next exchange reports
                while busy:
                    ended.wait(BEAT)
                    (busy,) = self.all_reduce_max(not ended.is_set())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

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
def one_line_when_lost(ranks: Ranks, kept: str) -> Iterator[None]:
    """Converts a failed collective into a one-line TrainingError; `kept` is the end of its fix."""
    try:
        yield
    except RuntimeError as error:
        if ranks.world_size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = re.sub(r"\[\S*?:\d+\] ", "", " ".join(str(error).split())).split(". ")[0][:120]
        if "timed out" in reason.lower():
            raise TrainingError(
                f"rank {ranks.rank} heard nothing from another for {ranks.timeout:g} minutes ({reason})",
                f"look at that machine and the network, or allow more by --rank_timeout; {kept}",
            ) from error
        raise TrainingError(
            f"rank {ranks.rank} lost another ({reason})", f"what that one said last tells why; {kept}"
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
    """The number of failures after which torchrun has restarted this rank, and its limit (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))


def job_name() -> str | None:
    """The name of this job, torchrun's `--rdzv-id`; None without torchrun or a name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name == "none" else name


@contextmanager
def open_ranks(
    device: str, timeout: float = ALONE.timeout, kept: str = "resume the run, or start it again if it has no checkpoint"
) -> Iterator[Ranks]:
    """Connects the ranks that torchrun started, by NCCL for GPUs, gloo for processors, while the context lasts.

    Each rank takes its own GPU, or all share the processor. A process group that the caller opened is used. `timeout`
    is in minutes; `kept` tells the user how to go on after a lost rank.

    Raises:
        ConfigError: this machine has fewer GPUs than ranks, or `device` is one GPU for all ranks, or rank 0's address
            cannot be right.
        TrainingError: ranks did not meet in time, or one was lost.
    """
    ranks = replace(ranks_from_environment(), timeout=timeout)
    if ranks.world_size == 1:
        yield ranks
        return
    with_gpus = check_device(device, ranks, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    with one_line_when_lost(ranks, kept):
        if dist.is_initialized():
            yield ranks
            return
        if with_gpus:
            torch.cuda.set_device(ranks.local_rank)
        store, addresses = meet(ranks)
        with gloo_interface(ranks, addresses):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if with_gpus else "gloo",
                store=store,
                rank=ranks.rank,
                world_size=ranks.world_size,
                timeout=timedelta(minutes=timeout),
            )
            try:
                yield ranks
            finally:
                dist.destroy_process_group()
                # gloo's threads still drop the last tensors, and need the interpreter for it. If it ended before that,
                # they would abort the process, and torchrun would count a whole run as failed.
                time.sleep(0.1)


def meet(ranks: Ranks) -> tuple[Any, list[str]]:
    """Waits for all ranks; returns the store of the process group and each rank's address.

    torchrun's store outlives the ranks. After a restart it holds what the ranks that ended have written, some of which
    may have had the same number. So rank 0 names each meeting anew, and a rank looks for itself in the list of all.

    Raises:
        ConfigError: the address of rank 0 cannot be right.
        TrainingError: not all ranks came within the timeout.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    check_address(ranks, host, port)
    me = [uuid.uuid4().hex, own_address(host)]
    limit = timedelta(minutes=ranks.timeout)
    start = time.monotonic()
    try:
        store, _, _ = next(rendezvous("env://", timeout=limit))
        if ranks.is_main:
            name = me[0]
            store.set("meeting", name)
            there = [f"{name}/{rank}" for rank in range(1, ranks.world_size)]
            store.wait(there, limit)
            everyone = [me, *(json.loads(store.get(key)) for key in there)]
            store.set(f"{name}/all", json.dumps(everyone))
        else:
            everyone = []
            while me not in everyone:
                name = store.get("meeting").decode()
                store.set(f"{name}/{ranks.rank}", json.dumps(me))
                if time.monotonic() - start > limit.total_seconds():
                    raise dist.DistStoreError("the others did not come")
                if store.check([f"{name}/all"]):
                    everyone = json.loads(store.get(f"{name}/all"))
                else:
                    time.sleep(0.05)
    except dist.DistError as error:
        waited = (time.monotonic() - start) / 60
        raise TrainingError(
            f"rank {ranks.rank} of {ranks.world_size} waited {waited:.2g} minutes for the others at {host}:{port}",
            "start as many processes as --nnodes times --nproc-per-node; look at the address, the port, the firewall",
        ) from error
    return dist.PrefixStore(name, store), [address for _, address in everyone]  # type: ignore[attr-defined]


def check_address(ranks: Ranks, host: str, port: str) -> None:
    """ConfigError if the address of rank 0 has no number, or stands for this machine while rank 0 is elsewhere."""
    fix = "start torchrun on every machine with --local-addr and the machine's own address, or mend /etc/hosts"
    try:
        found = {item[4][0] for item in socket.getaddrinfo(host, port)}
    except OSError as error:
        raise ConfigError(f"rank {ranks.rank} cannot find the address of rank 0's machine, {host!r}", fix) from error
    its_own = ranks.rank == ranks.local_rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if its_own or not all(ip_address(address).is_loopback for address in found):
        return
    with suppress(OSError), socket.create_connection((host, int(port)), 5):  # several torchruns on one machine
        return
    raise ConfigError(f"rank {ranks.rank} looks for rank 0 at {host!r}, which is its own machine here", fix)


def own_address(host: str) -> str:
    """This machine's IPv4 address on the way to another one; empty if there is no way."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # nothing is sent
        return str(probe.getsockname()[0])
    return ""


@contextmanager
def gloo_interface(ranks: Ranks, addresses: Sequence[str]) -> Iterator[None]:
    """Makes gloo use the network interface that leads to the other machines; `addresses` are those of all ranks.

    gloo would take the address that the machine's own name stands for, often 127.0.1.1, which leads nowhere from
    others. A name in GLOO_SOCKET_IFNAME goes first.
    """
    mine = addresses[ranks.rank]
    others = [address for address in addresses if address and not ip_address(address).is_loopback]
    if others and (not mine or ip_address(mine).is_loopback):  # rank 0's machine finds itself under such a name
        mine = own_address(others[0])
    name = interface_of(mine)
    if ranks.world_size == ranks.local_world_size or name is None or "GLOO_SOCKET_IFNAME" in os.environ:
        yield
        return
    os.environ["GLOO_SOCKET_IFNAME"] = name
    try:
        yield
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]


def interface_of(address: str) -> str | None:
    """The network interface with an IPv4 address; None if it is not found, or not on Linux."""
    with suppress(ImportError, OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        from fcntl import ioctl

        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no IPv4 address
                if socket.inet_ntoa(ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24]) == address:
                    return name
    return None


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
