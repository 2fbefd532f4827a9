"""Signals that come at an awkward moment, and handlers that are not Python's."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest

from torchmae.training.signals import stop_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Both signals are Python's own at the start, and again at the end."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    assert {signal.getsignal(number) for number in before} == {signal.default_int_handler}
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_between_the_two_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    register = signal.signal
    raised: list[int] = []

    def slowly(number: int, handler: Any) -> Any:
        result = register(number, handler)
        if not raised:
            raised.append(number)
            signal.raise_signal(number)
        return result

    monkeypatch.setattr(signal, "signal", slowly)
    with stop_signals() as stop:
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):  # the second ends at once
            signal.raise_signal(signal.SIGTERM)


def test_a_handler_of_c_code_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    look = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else look(number))
    with stop_signals() as stop:
        assert look(signal.SIGTERM) is signal.default_int_handler
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT
    monkeypatch.undo()


def test_other_threads_leave_signals_alone() -> None:
    seen = []

    def look() -> None:
        with stop_signals() as stop:
            seen.append((stop.number, signal.getsignal(signal.SIGINT)))

    thread = Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [(None, signal.default_int_handler)]
