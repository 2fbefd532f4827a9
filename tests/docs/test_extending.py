"""The page on parts of one's own: its program runs, and both languages have the same one."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
from pathlib import Path

from pages import DOCS, blocks

from torchmae import runs
from torchmae.cli import main

MOST_LINES = 30


def program(page: str) -> list[str]:
    return [code for language, code in blocks(DOCS / page) if language == "python"]


def follow(folder: Path) -> None:
    """What a process of its own does: the program of `folder`, without pictures of features, as in other tests."""
    os.chdir(folder)
    runs.write_pictures = lambda *_: []
    with Path("log").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        runpy.run_path("page.py", run_name="__main__")
        for words in (["runs/stripes"], ["runs/stripes", "runs/discs", "--out", "comparison.html"]):
            assert main(["report", *words]) == 0


def test_the_program_of_the_page_runs(tmp_path: Path) -> None:
    code = program("extending.md")
    (tmp_path / "page.py").write_text("\n".join(code), encoding="utf-8")
    process = multiprocessing.get_context("forkserver").Process(target=follow, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    for file in ("runs/stripes/report.html", "runs/discs/report.html", "features.npz"):
        assert (tmp_path / file).is_file(), file
    (evaluated,) = map(json.loads, (tmp_path / "runs/stripes/evaluations.jsonl").read_text().splitlines())
    assert "nearest_mean" in evaluated["results"][0]["figures"]
    for page in ("runs/stripes/report.html", "comparison.html"):
        assert "nearest class mean" in (tmp_path / page).read_text(), page


def test_both_languages_have_the_same_program_of_short_parts() -> None:
    assert program("extending.md") == program("extending.zh-CN.md")
    for code in program("extending.md"):
        for part in code.split("\n\n\n"):
            assert part.count("\n") < MOST_LINES
