"""Device, precision and threads of a computation."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.data._utils import signal_handling

import torchmae
from torchmae.data.jpeg import jpeg_decoder
from torchmae.errors import ConfigError
from torchmae.machine import num_cores
from torchmae.training.ranks import ALONE, Ranks

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST_KEPT = 256 * 2**20  # bytes
_LARGEST_UNTUNED = 32 * 2**20  # bytes: malloc adjusts its threshold to freed blocks of at most this size


@dataclass(frozen=True)
class Runtime:
    """The resolved device, precision, number of processor threads, and ranks."""

    device: torch.device
    precision: str  # "bf16" (autocast; weights stay fp32) or "fp32"
    threads: int
    ranks: Ranks = ALONE

    def autocast(self) -> AbstractContextManager[None]:
        """The context that forward passes run in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


_CALLS = threading.RLock()
_RUNNING: list[int] = []  # a number for each `callers_state` that has not ended
_UNDO = ExitStack()


@contextmanager
def callers_state() -> Iterator[None]:
    """Gives a program that calls torchmae its process-wide settings back.

    These are torch's number of threads and random state, glibc's malloc, warning filters, torch's handler of the end of
    a child, and what `undo_later` was told; of calls in several threads, the last to end gives them back.

    Raises:
        ConfigError: a process that reads images has imported the caller's program, which calls torchmae again.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself asks
        raise ConfigError(
            "a process that reads images has imported this program, which then called torchmae again",
            'put what the program does under `if __name__ == "__main__":`',
        )
    threads = torch.get_num_threads()
    with _CALLS:
        if not _RUNNING:
            _UNDO.callback(torch.set_num_threads, threads)
            _UNDO.callback(torch.set_rng_state, torch.get_rng_state())
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                _UNDO.callback(torch.cuda.set_rng_state, torch.cuda.get_rng_state())
            _UNDO.enter_context(warnings.catch_warnings())
        _RUNNING.append(threading.get_ident())
    try:
        with own_child_handler():
            yield
    finally:
        torch.set_num_threads(threads)  # it is each thread's own
        with _CALLS:
            _RUNNING.pop()
            if not _RUNNING:
                _UNDO.close()


def undo_later(function: Callable[..., object], *arguments: object) -> None:
    """Has `callers_state` call a function at its end; no-op outside of it."""
    with _CALLS:
        if _RUNNING:
            _UNDO.callback(function, *arguments)


@contextmanager
def own_child_handler() -> Iterator[None]:
    """Removes the handler of SIGCHLD that the first DataLoader with workers sets; the next one sets it again."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if before is not None and signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before)
            signal_handling._SIGCHLD_handler_set = False


def default_threads(ranks: Ranks) -> int:
    """OMP_NUM_THREADS; without it, or of several ranks on a machine (torchrun sets it to 1), a share of the cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if ranks.local_world_size == 1 and asked.isdecimal() and int(asked):
        return int(asked)
    return max(1, num_cores() // ranks.local_world_size)


def open_runtime(
    device: str, precision: str, threads: int | None, ranks: Ranks = ALONE, *, keep_memory: bool = True
) -> Runtime:
    """Resolves "auto", sets the number of threads, and with `keep_memory` tunes malloc on a processor.

    `device` is "auto" (cuda, else cpu; Apple's mps is untested) or a torch device; each of several ranks takes the GPU
    of its local rank. `precision` is "auto", "bf16" or "fp32". `threads` None: `default_threads`.

    Raises:
        ConfigError: there is no such device.
    """
    chosen = find_device(device)
    if ranks.world_size > 1 and chosen.type == "cuda":
        chosen = torch.device("cuda", ranks.local_rank)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # else pinning memory opens the first GPU too
    count = threads or default_threads(ranks)
    torch.set_num_threads(count)
    if keep_memory and chosen.type == "cpu":
        keep_freed_memory()
    resolved = precision if precision != "auto" else ("bf16" if has_fast_bf16(chosen) else "fp32")
    return Runtime(chosen, resolved, count, ranks)


def keep_freed_memory() -> bool:
    """Tunes glibc's malloc to keep freed blocks of up to 256 MiB for the next step; returns whether it did.

    By default the system takes back every large block and zeroes it again page by page: hundreds of thousands of page
    faults per step, a sixth of the time of a small model. Kept blocks fragment memory, so the largest still go back.
    The process keeps its peak memory (benchmarks/allocation.py) until `callers_state` ends. Another allocator
    (LD_PRELOAD), or a malloc tuned by the environment (MALLOC_*, GLIBC_TUNABLES), stays unchanged.
    """
    tuned = any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"))
    if tuned or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    undo_later(_give_back_memory)
    return mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) == 1 == mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)


def _give_back_memory() -> None:
    """Sets malloc to what glibc sets itself once a program has freed a block of 32 MiB, and returns what is kept."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_UNTUNED)
    libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_UNTUNED)
    libc.malloc_trim(0)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run faster than fp32 ones: CUDA's Ampere and later, x86 with AMX or AVX-512 bf16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # older ones lack it
        return bool(flags.get("amx_bf16") or flags.get("avx512_bf16"))
    return False


def environment(runtime: Runtime) -> dict[str, str | int]:
    """Versions, machine, command and start time (UTC), to repeat a measurement."""
    gpu = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else ""
    return {
        "torchmae": torchmae.__version__,
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "jpeg_decoder": jpeg_decoder(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": gpu or processor(),
        "device": str(runtime.device),
        "threads": runtime.threads,
        "ranks": runtime.ranks.world_size,
        "precision": runtime.precision,
        "command": _command(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def find_device(name: str) -> torch.device:
    """The device of a name, "auto": a GPU if there is one; ConfigError: there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}", "use auto, cpu, cuda, cuda:0 or mps") from error
    there = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }.get(device.type, 0)
    if (device.index or 0) >= there:
        raise ConfigError(
            f"device is {name!r} but torch finds {there} {device.type} devices here", "use --device auto, or cpu"
        )
    return device


def _command() -> str:
    """The command line if it is torchmae's own."""
    program = Path(sys.argv[0]) if sys.argv else Path()
    ours = program.stem == "torchmae" or (program.name == "__main__.py" and program.parent.name == "torchmae")
    return shlex.join(["torchmae", *sys.argv[1:]]) if ours else "Python API"


def processor() -> str:
    """The processor's name and number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()
