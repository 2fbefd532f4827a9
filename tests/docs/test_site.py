"""The site builds without a warning, in both languages, and its pages fetch nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import DOCS

from torchmae import cli, settings

pytest.importorskip("zensical", reason="needs pip install -e '.[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "site"
    command = [sys.executable, str(DOCS / "site" / "build.py"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_every_page_is_there_in_both_languages(site: Path) -> None:
    english = {page.relative_to(site) for page in site.rglob("*.html") if "zh" not in page.relative_to(site).parts}
    assert {page.relative_to(site / "zh") for page in (site / "zh").rglob("*.html")} == english
    written = {page.relative_to(DOCS).with_suffix(".html") for page in DOCS.rglob("*.md") if ".zh-CN" not in page.name}
    assert written <= english
    assert '<html lang="zh"' in read(site / "zh" / "faq.html")
    assert "为什么重建结果像噪声" in read(site / "zh" / "faq.html")
    assert "Where the time goes" in read(site / "zh" / "performance.html")  # not translated: English


def test_generated_pages_hold_what_the_package_has(site: Path) -> None:
    recipes, commands, api = (read(site / f"{name}.html") for name in ("recipes", "commands", "api"))
    assert all(f'id="{name}"' in recipes for name in settings.recipe_names())
    assert all(f'id="torchmae-{name.replace(" ", "-")}"' in commands for name in cli.COMMANDS)
    assert "--mask.ratio" in commands
    assert 'id="torchmae.training.pretrained.load"' in api


def test_formulas_need_no_script(site: Path) -> None:
    tutorial = read(site / "tutorial.html")
    assert tutorial.count("<math") > 20
    assert "$$" not in tutorial
    assert "<mtr>" in tutorial  # the equations that stand below each other
    for formula in re.findall(r"<math.*?</math>", tutorial, re.DOTALL):
        assert "\\" not in formula, f"a command that was not understood: {formula}"


def test_the_language_menu_leads_to_the_same_page(site: Path) -> None:
    assert 'href="./zh/faq.html"' in read(site / "faq.html")
    assert 'href="../faq.html"' in read(site / "zh" / "faq.html")
