from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_run import write_run

from torchmae import settings
from torchmae.cli import main
from torchmae.commands.evaluate import cell
from torchmae.config.base import make
from torchmae.config.evaluate import ComputeOptions, EvaluateOptions, RunOrBaseline
from torchmae.report.metrics import Figure
from torchmae.report.run import load_run

QUICK = ["--train-images", "120", "--test-images", "60", "--threads", "1", "--precision", "fp32", "--progress", "none"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "a")


def test_one_table_beside_the_baselines(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = len(load_run(run).evaluations)
    assert main(["evaluate", str(run), *QUICK, "--attentive.epochs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "120 training and 60 test images of 10 classes" in lines
    heading = next(line for line in lines if "Accuracy, % (95% interval)" in line)
    assert [heading.find(name) > 0 for name in ("this model", "untrained", "raw pixels")] == [True] * 3
    rows = [re.split(r"\s{2,}", line.strip())[0] for line in lines if re.search(r"\(.* to .*\)", line)]
    assert rows == [
        *(f"kNN, k = {k}" for k in (10, 20, 100)),
        *(f"linear probe, {what}" for what in ("patch mean", "patch mean, C = 0.1", "class token", "both")),
        "attentive probe",
    ]
    assert lines[-1] == f"recorded with settings, top-5, classes and confusions: {run / 'evaluations.jsonl'}"
    assert len(load_run(run).evaluations) == before + 1


def test_json_is_the_last_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--method", "knn", "--json", "--pool", "cls", *QUICK]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["method"] == "knn"
    assert printed["figures"]["model"] == load_run(run).evaluations[-1]["results"][0]["figures"]


def test_few_shot_shows_mean_and_deviation(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--labels-per-class", "2", "--draws", "2", "--threads", "1", "--progress", "none"]
    named = ["pixels", "--preset", "vit_digits", "--data", "digits", "--method", "knn"]
    assert main(["evaluate", *named, *few]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "±" in next(line for line in lines if "kNN, k = 20" in line)
    assert any("Accuracy, % ± deviation over draws" in line for line in lines)
    assert not any("recorded" in line for line in lines)  # pixels have no folder


def test_reconstruction_is_a_table_of_masks(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("skimage.metrics", reason="pip install 'torchmae[eval]'")
    options = ["--reconstruction.ratios", "[0.5, 0.75]", "--reconstruction.images", "10", *QUICK]
    assert main(["evaluate", str(run), "--method", "reconstruction", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "10 test images" in lines
    rows = [line.split()[:2] for line in lines if line.strip().startswith(("random", "block", "grid"))]
    assert rows == [[name, ratio] for name in ("random", "block", "grid") for ratio in ("0.5", "0.75")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "knnn"], "method is 'knnn'; did you mean 'knn'?"),
        (["--metod", "knn"], "unknown option 'metod'; did you mean --method?"),
        (["--labels-per-class", "500"], "labels_per_class is 500 and class"),
        (["--labels-per-class", "many"], "labels_per_class is many; it takes a whole number"),
        (["--data", "one-class.npz"], "labelled training images are of one class, '0'"),
        (["--data", "no-labels.npz"], "the training images have no labels"),
        (["--data", "colour.npz"], "has 3 channels and the model takes 1"),
        (["--data", "nowhere.npz"], "no such file or folder: nowhere.npz"),
        (["--test-data", "tset"], "test_data 'tset' cannot be used"),
    ],
)
def test_mistakes_end_in_one_line(
    run: Path,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 1), dtype=np.uint8)
    np.savez("one-class.npz", images=images, labels=np.zeros(20, dtype=np.int64))
    np.savez("no-labels.npz", images=images)
    np.savez("colour.npz", images=np.repeat(images, 3, axis=-1), labels=np.arange(20) % 2)
    assert main(["evaluate", str(run), *options, "--threads", "1", "--progress", "none"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("torchmae: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "model.safetensors").unlink(), "has no weights yet"),
        (lambda run: (run / "model.safetensors").write_bytes(b"x" * 100), "model.safetensors is text"),
        (lambda run: (run / "model.json").write_text('{"arguments": {'), "model.json"),
        (lambda run: (run / "config.yaml").unlink(), "does not say which; add --data PATH_OR_NAME"),
        (shutil.rmtree, "holds no model"),
    ],
    ids=["no weights", "damaged weights", "half a description", "no configuration", "no run"],
)
def test_a_run_that_is_not_whole(
    damage: Callable[[Path], object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a")
    damage(run)
    assert main(["evaluate", str(run), "--method", "knn", *QUICK]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("torchmae: ") and error.count("\n") == 1


def test_images_of_another_size_are_resampled_and_that_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 255, (40, 12, 10, 1), dtype=np.uint8)
    np.savez(tmp_path / "other.npz", images=images, labels=np.arange(40) % 2)
    assert main(["evaluate", str(run), "--method", "knn", "--data", str(tmp_path / "other.npz"), *QUICK]) == 0
    assert "note: images of 12x10 are cropped and resampled to the model's 8x8" in capsys.readouterr().out


def test_a_disk_that_is_full_does_not_cost_the_figures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "evaluations.jsonl").unlink(missing_ok=True)
    (run / "evaluations.jsonl").mkdir()
    try:
        assert main(["evaluate", str(run), "--method", "knn", "--json", *QUICK]) == 2
    finally:
        (run / "evaluations.jsonl").rmdir()
    printed = capsys.readouterr()
    assert "kNN, k = 20" in printed.out
    assert json.loads(printed.out.splitlines()[-1])["figures"]["model"]["knn20"] >= 0
    assert "cannot write" in printed.err and printed.err.count("\n") == 1


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path), "--data", "digits"]) == 2
    assert "holds no model" in capsys.readouterr().err
    assert main(["evaluate"]) == 2
    assert "not given: run" in capsys.readouterr().err


def test_the_commands_of_the_page_have_options_that_exist() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
    lines = re.findall(r"^torchmae evaluate (.*?)(?:#.*)?$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) >= 6
    for line in lines:
        given = settings.read_words(shlex.split(line), RunOrBaseline, ComputeOptions, EvaluateOptions)
        assert make(RunOrBaseline, given).run and make(EvaluateOptions, given)


def test_a_cell_says_how_sure_its_figure_is() -> None:
    figures = [Figure("44.0", "43.0 to 45.1"), Figure("30.0", "± 1.2"), Figure("0.500"), Figure()]
    assert [cell(figure) for figure in figures] == ["44.0 (43.0 to 45.1)", "30.0 ± 1.2", "0.500", ""]
