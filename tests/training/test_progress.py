from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from torchmae.training import progress
from torchmae.training.progress import Display, Status, clock

STATUS = Status(30, 120, 2.5, 10.0, 0.51234, 12345.6, 0.0123, 75.4)
LINE = "epoch 2.5/10.0  step 30/120  loss 0.5123  eta 1:15  12,346 images/s  data wait 1.2%"
LAST = Status(120, 120, 10.0, 10.0, 0.4, 100.0, 0.0, 0.0)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list of one, that passes only when it is changed."""
    held = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: held[0])
    return held


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (9.6, "0:10"), (59.7, "1:00"), (3599.4, "59:59"), (3723, "1:02:03")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_line_says_it_all() -> None:
    assert STATUS.line() == LINE


def test_plain_lines_come_every_ten_seconds_and_at_the_end(now: list[float]) -> None:
    stream = io.StringIO()
    display = Display("auto", stream)
    for seconds in (0, 5, 11, 3, 8):
        now[0] += seconds
        display.training(STATUS)
    display.training(LAST)
    display.close()
    lines = stream.getvalue().splitlines()
    assert lines == [LINE, LINE, LAST.line()]


def test_preparing_in_plain_lines(now: list[float]) -> None:
    stream = io.StringIO()
    display = Display("plain", stream)
    for done in range(100, 1001, 100):
        now[0] += 4
        display.preparing("reading images", done * 10, 10_000)
    assert stream.getvalue().splitlines() == [
        "reading images: 3,000 of 10,000",
        "reading images: 6,000 of 10,000",
        "reading images: 9,000 of 10,000",
        "reading images: 10,000 of 10,000",
    ]


def test_long_lines_and_brackets_are_left_alone() -> None:
    stream = io.StringIO()
    text = "run folder runs/[bold]x " + "y" * 300
    Display("plain", stream).say(text)
    assert stream.getvalue() == text + "\n"


def test_a_live_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    stream = Terminal()
    display = Display("auto", stream)
    display.preparing("reading images", 500, 1000)
    display.preparing("reading images", 1000, 1000)
    display.say("run folder runs/a")
    display.training(STATUS)
    display.training(LAST)
    display.close()
    display.close()  # twice does no harm
    shown = stream.getvalue()
    for text in ("reading images 1,000/1,000", "run folder runs/a", LAST.line()):
        assert text in shown
    assert "\x1b[" in shown  # it is redrawn in place
    assert shown.index("reading images") < shown.index("run folder") < shown.index(LAST.line())


def test_a_narrow_terminal_gets_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    display = Display("auto", stream)
    display.training(STATUS)
    display.close()
    rows = re.sub(r"\x1b\[\S*?[A-Za-z]", "", stream.getvalue()).replace("\r", "\n").split()
    text = " ".join(rows)
    assert "step 30/120 loss 0.5123 eta 1:15" in text
    assert stream.getvalue().count("\n") == 1


@pytest.mark.parametrize("mode", ["epochs", "none"])
def test_quiet_modes_warn_all_the_same(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    display = Display(mode, stream)
    display.say("x")
    display.preparing("x", 1, 1)
    display.training(LAST)
    display.epoch(1, 10, 0.123456)
    display.warn("a checkpoint is damaged")
    assert stream.getvalue() == "a checkpoint is damaged\n"
    printed = capsys.readouterr().out
    assert printed == ("Epoch [1/10], Loss: 0.1235\n" if mode == "epochs" else "")


def test_plain_mode_has_no_epoch_lines(capsys: pytest.CaptureFixture[str]) -> None:
    Display("plain", io.StringIO()).epoch(1, 10, 0.5)
    assert capsys.readouterr().out == ""


def test_standard_error_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    Display("auto").say(str(Path("runs/a")))
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "runs/a\n")
