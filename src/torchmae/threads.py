"""Number of processor cores, and how OpenMP's threads wait; torch reads the latter when it is imported."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPIN_COUNT = "10000"


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
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
