from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_run import write_run

from torchmae.cli import main
from torchmae.commands.evaluate import cell
from torchmae.evaluation.records import read_records

QUICK = ["--train-images", "120", "--test-images", "60", "--threads", "1", "--precision", "fp32", "--progress", "none"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "a")


def test_one_table_beside_the_baselines(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = len(read_records(run))
    assert main(["evaluate", str(run), *QUICK, "--attentive.epochs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "120 training and 60 test images of 10 classes" in lines
    heading = next(line for line in lines if "accuracy, %" in line)
    assert [heading.find(name) > 0 for name in ("this model", "untrained", "raw pixels")] == [True] * 3
    rows = [line.split()[0] for line in lines if "[" in line]
    assert rows == ["knn10", "knn20", "knn100", "linear_mean", "linear_c0.1", "linear_cls", "linear_both", "attentive"]
    assert len(read_records(run)) == before + 1


def test_the_same_command_twice_prints_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(run), "--method", "linear", "--data", "digits", "--test-data", "held-out", *QUICK]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert main(command) == 0
    assert capsys.readouterr().out == first


def test_json_is_the_last_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--method", "knn", "--json", "--pool", "cls", *QUICK]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["method"] == "knn"
    assert printed["figures"]["model"] == read_records(run)[-1]["results"][0]["figures"]


def test_few_shot_shows_mean_and_deviation(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--labels-per-class", "2", "--draws", "2", "--threads", "1", "--progress", "none"]
    named = ["pixels", "--preset", "vit_digits", "--data", "digits", "--method", "knn"]
    assert main(["evaluate", *named, *few]) == 0
    assert "±" in next(line for line in capsys.readouterr().out.splitlines() if "knn20" in line)


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


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path), "--data", "digits"]) == 2
    assert "holds no model" in capsys.readouterr().err
    assert main(["evaluate"]) == 2
    assert "not given: run" in capsys.readouterr().err


def test_a_cell_says_how_sure_its_figure_is() -> None:
    figures = {"a": 44.04, "a_low": 43.0, "a_high": 45.06, "b": 30.0, "b_std": 1.25, "c": 0.5}
    assert [cell(figures, name) for name in "abcd"] == ["44.0 [43.0, 45.1]", "30.0 ± 1.2", "0.500", ""]
