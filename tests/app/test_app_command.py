from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from app_runs import write_images, write_run

from torchmae.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return write_run(folder / "a", write_images(folder / "images"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "not given: runs"),
        (["nowhere"], "nowhere holds no model"),
        (["{run}", "{run}", "{run}"], "3 runs are given; the page compares two"),
        (["{run}", "--features", "none.npz"], "no such file: none.npz; write it with `torchmae embed`"),
        (["{run}", "--data", "nothing-here"], "'nothing-here' is neither a path nor the name of a data set"),
        (["{run}", "--lang", "fr"], "lang is 'fr'; choose from en, zh"),
        (["{run}", "--port", "70000"], "port is 70000; it must lie in [0, 65535]"),
        (["{run}", "--host", "no.such.host.invalid"], "host 'no.such.host.invalid' is not known"),
    ],
)
def test_mistakes_are_one_line(args: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    words = [arg.replace("{run}", str(run)) for arg in args]
    assert main(["app", *words, "--device", "cpu"] if words else ["app"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_without_gradio(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torchmae.commands.app.find_spec", lambda name: None)
    assert main(["app", str(run)]) == 2
    assert "the page needs gradio, which is not installed; pip install 'torchmae[app]'" in capsys.readouterr().err


def test_ctrl_c_ends_it(run: Path) -> None:
    pytest.importorskip("gradio")
    process = subprocess.Popen(
        [sys.executable, "-m", "torchmae", "app", str(run), "--port", "0", "--device", "cpu", "--host", "0.0.0.0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert line.startswith("http://localhost:") and line.endswith("/  (Ctrl-C stops it)\n")
    assert (process.returncode, rest) == (130, "")
    assert errors.splitlines() == [
        "torchmae: --host 0.0.0.0: whoever can reach this computer can open the page",
        "torchmae: stopped",
    ]
