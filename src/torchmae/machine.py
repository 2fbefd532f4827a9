"""What this process may use of the machine: cores, memory, shared memory; how OpenMP's threads wait.

Torch reads the last when it is imported.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

GIB = 2**30
SPIN_COUNT = "10000"

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
SHARED_MEMORY = Path("/dev/shm")


def wait_briefly(environ: MutableMapping[str, str]) -> None:
    """Lets a waiting thread spin 10,000 times before it sleeps, unless the environment sets another policy.

    Without spinning, small models lose a quarter of their speed. With long spinning they lose nine tenths when another
    program uses a core (benchmarks/waiting.py).
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def wait_as_usual(environ: MutableMapping[str, str]) -> None:
    """Undoes `wait_briefly`."""
    if environ.get("GOMP_SPINCOUNT") == SPIN_COUNT:
        del environ["GOMP_SPINCOUNT"]


def num_cores() -> int:
    """Number of processor cores that this process may use, by its affinity and its container's quota (rounded up)."""
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for values in _limits("cpu", "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"):
        if len(values) == 2 and min(values) > 0:
            cores = min(cores, values[0] / values[1])
    return math.ceil(cores)


def memory() -> float:
    """Bytes of memory that this process may use: the machine's, or its container's limit; infinite if unknown."""
    limits = [values[0] for values in _limits("memory", "memory.max", "memory.limit_in_bytes") if values]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=math.inf)


def bytes_to_keep(limit: float) -> float:
    """A limit in GiB as bytes, at most half of `memory`."""
    return min(limit * GIB, memory() / 2)


def free_shared_memory() -> float:
    """Bytes of /dev/shm that are free for this process, a share where torchrun has started several; else infinite."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except (OSError, AttributeError):  # Windows, macOS
        return math.inf
    return found.f_bavail * found.f_frsize / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _limits(controller: str, second: str, *first: str) -> Iterator[list[float]]:
    """The numbers of a limit in each control group around this process.

    They are in the file `second` of a group of version 2, in the files `first` of one of version 1; "max" is infinite.
    """
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and controller not in controllers.split(","):
            continue
        mounted, names = (CONTROL_GROUPS / controller, first) if controllers else (CONTROL_GROUPS, (second,))
        # Inside a container the path may be the host's: then only the container's own group, mounted here, is there.
        group = mounted / ("" if ".." in path else path.lstrip("/"))
        while group.is_relative_to(mounted):
            files = [group / name for name in names]
            if all(file.is_file() for file in files):
                yield [float(word.replace("max", "inf")) for file in files for word in file.read_text().split()]
            group = group.parent
