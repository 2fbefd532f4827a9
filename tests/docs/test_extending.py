"""The page on parts of one's own: its program runs, and both languages have the same one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pages import DOCS, blocks

MOST_LINES = 30


def program(page: str) -> list[str]:
    return [code for language, code in blocks(DOCS / page) if language == "python"]


def test_the_program_of_the_page_runs(tmp_path: Path) -> None:
    code = program("extending.md")
    (tmp_path / "page.py").write_text("\n".join(code), encoding="utf-8")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for file in ("runs/stripes/report.html", "runs/discs/report.html", "features.npz"):
        assert (tmp_path / file).is_file(), file


def test_both_languages_have_the_same_program_of_short_parts() -> None:
    assert program("extending.md") == program("extending.zh-CN.md")
    for code in program("extending.md"):
        for part in code.split("\n\n\n"):
            assert part.count("\n") < MOST_LINES
