"""How processor threads wait for each other. Read once, when torch is imported, hence set before (`cli.main`)."""

from __future__ import annotations

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
