"""What every reader promises, whatever it is given: it comes to an end, and leaves the disk as it was."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

_TOO_LONG_S = 120  # for all examples of a test, which take seconds: something hangs


@pytest.fixture(autouse=True)
def _comes_to_an_end() -> Iterator[None]:
    def give_up(*_: object) -> None:
        pytest.fail(f"still reading after {_TOO_LONG_S} s")  # no Exception, so that no reader takes it for damage

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(_TOO_LONG_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for what is read; nothing may appear beside it, or where the process stands."""
    place, here = tmp_path / "data", tmp_path / "here"
    place.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    yield place
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "here"]
    assert not any(here.iterdir())
