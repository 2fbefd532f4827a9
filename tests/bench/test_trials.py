"""benchmarks/trials.py: its trials are settings that exist, and what is there is not measured again."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

import torchmae
from torchmae import presets
from torchmae.building import check_model, overrides
from torchmae.settings import from_recipe

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.syspath_prepend(BENCHMARKS / "cases")
    return importlib.import_module("trials")


def test_trials_are_settings_of_a_run(trials: ModuleType) -> None:
    recipes = {about.recipe for name, about in trials.SETS.items() if name != "digits"}  # too small for some
    for options in trials.TRIALS.values():
        for recipe in recipes:
            config = from_recipe({"recipe": recipe, **options})
            check_model(config, presets.weightless(presets.arguments(config.model.preset, **overrides(config))))


def test_a_table_is_made_and_made_again(
    trials: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trials, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(trials, "PAGE", tmp_path / "page.md")
    marks = "<!-- trials digits-1-epochs -->", "<!-- /trials digits-1-epochs -->"
    trials.PAGE.write_text(f"before\n\n{marks[0]}\nold\n{marks[1]}\n\nafter\n", encoding="utf-8")
    words = ["trials.py", "digits", "digits", "--trials", "bs32", "--epochs", "1", "--seeds", "1"]
    monkeypatch.setattr("sys.argv", [*words, "--work", str(tmp_path / "work")])
    trials.main()
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1::2] for row in rows] == [["bs32", "--batch_size 32"]]
    assert trials.PAGE.read_text(encoding="utf-8") == f"before\n\n{marks[0]}\n{printed}{marks[1]}\n\nafter\n"
    results = tmp_path / "results" / "digits-1-epochs.json"
    found = json.loads(results.read_text(encoding="utf-8"))
    assert found["trials"]["bs32"][0].keys() >= {"images_seen", "seconds", "explained_variance", "knn20", "linear_c0.1"}
    results.write_text(json.dumps({"trials": {"earlier": [{"images_seen": 5.0, "knn20": 90.0}]}}), encoding="utf-8")
    with monkeypatch.context() as without:
        without.setattr(torchmae, "pretrain", None)
        trials.main()
    assert capsys.readouterr().out == printed
    assert json.loads(results.read_text(encoding="utf-8"))["trials"].keys() == {"earlier", "bs32"}


def test_the_tables_of_the_page_are_what_was_measured(trials: ModuleType) -> None:
    page = trials.PAGE.read_text(encoding="utf-8")
    files = sorted(trials.RESULTS.glob("*.json"))
    assert files
    for path in files:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["environment"].keys() >= {"processor", "cores", "torch"}
        assert trials.between(page, f"trials {path.stem}", trials.table(found["trials"])) == page
        assert trials.between(page, f"trials {path.stem}", "") != page  # it has a place there
