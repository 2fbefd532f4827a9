"""Processor cores; and how threads wait for each other: read once, when torch is imported, so set before that."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPIN_COUNT = "10000"


def wait_briefly(environ: MutableMapping[str, str]) -> None:
    """A thread that waits looks 10,000 times before it sleeps, unless the environment says how it should wait.

    Sleeping at once costs a quarter of the speed of small models; spinning for long, nine tenths as soon as another
    program wants a core (benchmarks/waiting.py).
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def wait_as_usual(environ: MutableMapping[str, str]) -> None:
    """Takes `wait_briefly` back."""
    if environ.get("GOMP_SPINCOUNT") == SPIN_COUNT:
        del environ["GOMP_SPINCOUNT"]


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
