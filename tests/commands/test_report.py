from __future__ import annotations

import json
from pathlib import Path

import pytest

from torchmae.cli import main


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        (folder / "config.yaml").write_text("seed: 1\nbatch_size: 8\n")
        record = {"kind": "val", "step": 3, "loss": 0.5, "loss_mean_patch": 1.0, "loss_interpolation": 0.6}
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return folders


def test_one_run_gets_its_own_page(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs[0])]) == 0
    assert capsys.readouterr().out == f"{runs[0] / 'report.html'}\n"
    assert "Is my loss good?" in (runs[0] / "report.html").read_text(encoding="utf-8")


def test_out_names_the_page(runs: list[Path], tmp_path: Path) -> None:
    assert main(["report", str(runs[0]), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").exists() and not (runs[0] / "report.html").exists()


def test_several_runs_get_one_page(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", "a", "b"]) == 0
    assert capsys.readouterr().out == "comparison.html\n"
    assert "2 runs compared" in (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert main(["report", "a", "b", "--out", "other.html"]) == 0
    assert (tmp_path / "other.html").read_bytes() == (tmp_path / "comparison.html").read_bytes()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "not given: runs"),
        (["nowhere"], "run folder 'nowhere' does not exist; give a folder that torchmae pretrain wrote"),
        (["{a}", "nowhere"], "run folder 'nowhere' does not exist"),
        (["{a}", "{a}/"], "is given twice; name each run once"),
        (["{a}", "--out", "page.pdf"], "out is 'page.pdf'; give a name that ends in .html"),
        (["{a}", "--outt", "page.html"], "unknown option 'outt'; did you mean --out?"),
    ],
)
def test_mistakes_are_one_line(
    args: list[str], message: str, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *(arg.replace("{a}", str(runs[0])) for arg in args)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
