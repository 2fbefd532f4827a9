"""Memory: what becomes of it when a step on a processor gives it back, and how to tell that there was none."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_NO_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")  # CUDA and NCCL, a processor, cuBLAS
_MOST = 2**31 - 1  # mallopt takes C integers: blocks of 2 GiB and more still go back at once


def keep_freed_memory() -> bool:
    """Has glibc's allocator keep what is freed, for the step that comes.

    By default it gives every large block back to the system and asks for it anew, zeroed page by page: hundreds of
    thousands of page faults a step, a sixth of its time for a small model. What the process held once, it goes on
    holding; the peak grows by 7% at most (benchmarks/allocation.py). Another allocator (LD_PRELOAD) is not touched, nor
    is one that the environment has tuned (MALLOC_*, GLIBC_TUNABLES).

    Returns:
        Whether it was done: not where there is no glibc.
    """
    tuned = any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"))
    if tuned or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(option, _MOST) == 1 for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory left, a GPU's or a processor's; not every library has a class for
    that."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)
