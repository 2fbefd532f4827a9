"""SIGINT and SIGTERM end a run after its current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """The signal that asked the run to end."""

    number: int | None = None


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Records the first SIGINT or SIGTERM; the second one ends the process at once.

    Handlers stay unchanged outside the main thread, where Python cannot set them, and where C code has set them, since
    Python could not restore those.
    """
    stop = Stop()
    handled = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: handler for number in handled if (handler := signal.getsignal(number)) is not None}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: object) -> None:
        stop.number = number
        restore()

    try:
        for number in before:
            if stop.number is None:  # after an early signal, the next one must end the process
                signal.signal(number, note)
        yield stop
    finally:
        restore()
