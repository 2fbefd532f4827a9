"""SIGINT and SIGTERM: a run that they stop finishes its step first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """Whether a signal asked for an end.

    Attributes:
        number: the signal, or None.
    """

    number: int | None = None


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM are noted and the current step goes on to its end; a second one ends at once."""
    stop = Stop()

    def note(number: int, _frame: object) -> None:
        stop.number = number
        for name, handler in before.items():
            signal.signal(name, handler)

    try:
        before = {name: signal.signal(name, note) for name in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller's business
        yield stop
        return
    try:
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
