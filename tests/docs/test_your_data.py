"""The page on your own data: its code, run as it stands on real images, ends where it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import DOCS, blocks, programs_of_minutes

ENGLISH, CHINESE = DOCS / "your-data.md", DOCS / "your-data.zh-CN.md"


@programs_of_minutes
def test_following_the_page_ends_with_a_better_classifier(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    found = blocks(ENGLISH)
    printed = ""
    # One thread: the tests of several processes run side by side, and networks this small gain nothing from more.
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for language, code in found:
        if language == "python":
            name = code.splitlines()[0].removeprefix("# ")
            assert name.endswith(".py"), f"a program without its name:\n{code}"
            (tmp_path / name).write_text(code, encoding="utf-8")
        elif language == "sh":
            done = subprocess.run(["bash", "-ec", code], cwd=tmp_path, env=env, capture_output=True, text=True)
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
            printed += done.stdout
    for file in ("sheet.png", "runs/mine/report.html", "neighbours.png", "features.npz", "exported/mine/config.json"):
        assert (tmp_path / file).is_file(), file

    pretrained, scratch = accuracies(printed)
    said_pretrained, said_scratch = accuracies("".join(code for language, code in found if language == "text"))
    assert pretrained > 75
    assert pretrained > scratch + 30
    assert pretrained == pytest.approx(said_pretrained, abs=8)
    assert scratch == pytest.approx(said_scratch, abs=15)


def test_both_languages_have_the_same_code() -> None:
    assert len(blocks(ENGLISH)) >= 10
    assert blocks(ENGLISH) == blocks(CHINESE)


def accuracies(text: str) -> tuple[float, float]:
    """From the backbone, from scratch."""
    (pretrained,) = re.findall(r"from your backbone +([\d.]+)%", text)
    (scratch,) = re.findall(r"from scratch +([\d.]+)%", text)
    return float(pretrained), float(scratch)
