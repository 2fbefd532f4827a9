"""The page on detection and segmentation: its programs run in both libraries, with few steps on small pictures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pages import DOCS, blocks, programs_of_minutes
from PIL import Image

ENGLISH, CHINESE = DOCS / "dense.md", DOCS / "dense.zh-CN.md"
MOST_LINES = 60
TINY = "--epochs 1 --batch_size 4 --model.input_size 32 --model.depth 4 --model.embed_dim 24 --model.decoder_depth 1"


def discs(folder: Path, count: int, seed: int) -> None:
    """Pictures of bright discs on a dark ground, and masks that number them."""
    random = np.random.default_rng(seed)
    row, column = np.mgrid[:64, :64]
    for place in ("images", "masks"):
        (folder / place).mkdir(parents=True)
    for i in range(count):
        ids = np.zeros((64, 64), np.uint16)
        for number, (y, x) in enumerate(random.integers(8, 56, (3, 2)), 1):
            ids[(row - y) ** 2 + (column - x) ** 2 < 40] = number
        picture = 40 + 150 * (ids > 0) + random.integers(0, 30, (64, 64))
        Image.fromarray(picture.astype(np.uint8)).save(folder / "images" / f"{i}.png")
        Image.fromarray(ids).save(folder / "masks" / f"{i}.png")


@programs_of_minutes
def test_following_the_page_ends_with_figures_of_both(tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    pytest.importorskip("timm")
    discs(tmp_path / "nuclei" / "train", 8, 0)
    discs(tmp_path / "nuclei" / "test", 2, 1)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    printed = ""
    for language, code in blocks(ENGLISH):
        if language == "python":
            (tmp_path / code.splitlines()[0].removeprefix("# ")).write_text(code, encoding="utf-8")
        elif language == "sh":
            code = code.replace("--max-minutes 5", TINY).replace("py 400 0", "py 1 0")
            code = code.replace("torchmae ", f"{sys.executable} -m torchmae ")
            done = subprocess.run(["bash", "-ec", code], cwd=tmp_path, env=env, capture_output=True, text=True)
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
            printed += done.stdout
    for figure in ("F1 at an IoU of 0.5", "IoU of the objects"):
        found = re.findall(rf"(from your backbone|from scratch) +{figure}: ([01]\.\d+)", printed)
        assert [name for name, _ in found] == ["from your backbone", "from scratch"], printed


def test_both_languages_have_the_same_short_programs() -> None:
    assert blocks(ENGLISH) == blocks(CHINESE)
    programs = [code for language, code in blocks(ENGLISH) if language == "python"]
    assert len(programs) == 2
    for code in programs:
        assert sum(bool(line.strip()) for line in code.splitlines()) < MOST_LINES
