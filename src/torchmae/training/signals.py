"""SIGINT and SIGTERM: a run that they stop finishes its step first."""

from __future__ import annotations

import signal
import threading
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
    """SIGINT and SIGTERM are noted and the current step goes on to its end; a second one ends at once.

    Left alone are signals outside the main thread, which are the caller's business, and those that C code handles:
    Python could not give them back.
    """
    stop = Stop()
    mine = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: handler for number in mine if (handler := signal.getsignal(number)) is not None}

    def give_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: object) -> None:
        stop.number = number
        give_back()

    try:
        for number in before:
            if stop.number is None:  # else one has come already, and the next must end at once
                signal.signal(number, note)
        yield stop
    finally:
        give_back()
