"""The tables of real cases are what was measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from pages import PAGES, ROOT

RESULTS = sorted((ROOT / "benchmarks" / "results" / "cases").glob("*.json"))


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "cases")
    return importlib.import_module("case")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_tables_are_what_was_measured(path: Path, case: ModuleType) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    measured = importlib.import_module(path.stem).CASE
    assert len(found["seeds"]) == 3
    assert found["environment"].keys() >= {"processor", "cores", "torch"}
    pages = [page for page in PAGES if f"<!-- {path.stem} -->" in page.read_text(encoding="utf-8")]
    assert len({page.name.endswith(".zh-CN.md") for page in pages}) == 2
    for page in pages:
        text, language = page.read_text(encoding="utf-8"), "zh" if page.name.endswith(".zh-CN.md") else "en"
        assert case.render(text, measured, found, language) == text
        changed = [{key: value + 1 for key, value in seed.items()} for seed in found["seeds"]]
        assert case.render(text, measured, {**found, "seeds": changed}, language) != text
