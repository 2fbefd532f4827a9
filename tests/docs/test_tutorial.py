"""The tutorial: its code runs, prints what the page says, and its tables are what was measured."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pages import programs_of_minutes

from torchmae import settings

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ENGLISH, CHINESE = DOCS / "tutorial.md", DOCS / "tutorial.zh-CN.md"
PAGES = [ENGLISH, CHINESE]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DISPLAYED = re.compile(r"\$\$(.*?)\$\$", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+|\d+%")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and content of the page's fenced blocks, in order."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def outputs(page: Path) -> list[str]:
    return [content for language, content in blocks(page) if language == "text"]


def syntax(page: Path) -> list[str]:
    """The page's Python without its comments."""
    return [ast.unparse(ast.parse(content)) for language, content in blocks(page) if language == "python"]


def assert_same_output(printed: str, expected: str) -> None:
    """Words and whole numbers to the letter; decimals and percentages, which differ among machines, nearly."""
    assert NUMBER.sub("<number>", printed) == NUMBER.sub("<number>", expected)
    for one, other in zip(NUMBER.findall(printed), NUMBER.findall(expected), strict=True):
        assert float(one.rstrip("%")) == pytest.approx(float(other.rstrip("%")), rel=0.15, abs=0.03)


def tutorial_benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tutorial_benchmark", ROOT / "benchmarks" / "tutorial.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@programs_of_minutes
def test_the_code_of_the_page_prints_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    namespace: dict[str, Any] = {"__name__": "tutorial"}
    found = blocks(ENGLISH)
    try:
        for (language, code), (follower, expected) in zip(found, [*found[1:], ("", "")], strict=True):
            if language != "python":
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, str(ENGLISH), "exec"), namespace)
            assert follower == "text", f"no output is shown after:\n{code}"
            assert_same_output(printed.getvalue(), expected)
    finally:
        torch.set_num_threads(threads)


def test_both_languages_have_the_same_code_and_output() -> None:
    assert len(syntax(ENGLISH)) > 10
    assert syntax(ENGLISH) == syntax(CHINESE)
    assert outputs(ENGLISH) == outputs(CHINESE)


def test_both_languages_have_the_same_sections_formulas_and_pictures() -> None:
    shapes = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        headings = [line.partition(" ")[0] for line in FENCE.sub("", text).splitlines() if line.startswith("#")]
        # A formula's words are translated, and what stands beside them may change places.
        wordless = [re.sub(r"\\text\{[^}]*\}|\s", "", formula) for formula in DISPLAYED.findall(text)]
        displayed = ["".join(sorted(formula)) for formula in wordless]
        shapes.append((headings, displayed, re.findall(r"\]\((images/[^)]*)\)", text)))
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_the_page_have_options_that_exist(page: Path) -> None:
    lines = [line for language, content in blocks(page) if language == "sh" for line in content.splitlines()]
    commands = [shlex.split(line)[2:] for line in lines if line.startswith("torchmae pretrain")]
    assert len(commands) >= 5
    for args in commands:
        assert settings.parse(args).recipe in ("auto", *settings.recipe_names())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_the_page_points_to_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert targets
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_are_what_was_measured(page: Path) -> None:
    benchmark = tutorial_benchmark()
    results = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    assert benchmark.render(results, text) == text


def test_a_table_that_was_not_rendered_is_noticed() -> None:
    benchmark = tutorial_benchmark()
    results = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    text = ENGLISH.read_text(encoding="utf-8")
    results["losses"]["literal"]["hidden"] += 0.001
    assert benchmark.render(results, text) != text


@pytest.mark.parametrize(
    ("printed", "expected"),
    [("loss 0.61\n", "loss 0.90\n"), ("60 steps\n", "61 steps\n"), ("True\n", "False\n"), ("40%\n", "60%\n")],
)
def test_output_that_differs_is_noticed(printed: str, expected: str) -> None:
    with pytest.raises(AssertionError):
        assert_same_output(printed, expected)


def test_output_may_differ_by_rounding() -> None:
    assert_same_output("60 steps, loss 0.61, 47%\n", "60 steps, loss 0.60, 46%\n")
