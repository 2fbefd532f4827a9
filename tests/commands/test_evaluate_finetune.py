"""`torchmae evaluate --method finetune`: figures, folders, records, resuming, and mistakes."""

from __future__ import annotations

import json
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import write_run

from torchmae.cli import main
from torchmae.errors import CheckpointError
from torchmae.evaluation import finetune
from torchmae.report.run import load_run
from torchmae.training import trainer
from torchmae.training.saved_classifier import load_classifier
from torchmae.training.saved_model import load_model

QUICK = ["--train-images", "120", "--test-images", "60", "--threads", "1", "--precision", "fp32", "--progress", "none"]
FINETUNE = ["--method", "finetune", "--finetune.epochs", "2", "--finetune.batch-size", "40", *QUICK]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "a")


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_classifier_its_figures_and_their_record(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), *FINETUNE, "--json"]) == 0
    printed = capsys.readouterr().out.splitlines()
    out = run / "finetune-pretrained"
    assert "120 training and 60 test images of 10 classes" in printed
    assert [line.split()[0] for line in printed if " to " in line and "{" not in line] == ["fine-tuned"]
    assert f"note: fine-tuned on 120 labelled images; the classifier is in {out}" in printed
    record = load_run(run).evaluations[-1]
    figures = record["results"][0]["figures"]
    assert json.loads(printed[-1])["figures"]["model"] == figures
    assert {"finetune", "finetune_top5", "finetune_low", "finetune_high", "finetune_loss"} <= figures.keys()
    assert figures["finetune_images"] == 120
    assert record["method"] == "finetune"
    assert record["options"]["finetune"]["epochs"] == 2
    assert record["data"]["train_images"] == 120
    assert sum(item["images"] for item in record["results"][0]["details"]["finetune"]["per_class"]) == 60
    classifier, description = load_classifier(out)
    assert classifier.head.out_features == 10
    assert description.mean == (0.3,)
    assert [line["finetune"] for line in lines_of(out) if line["kind"] == "val"] == [figures["finetune"]]


def test_crops_are_of_the_fine_tuning_and_flips_of_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = []
    original = finetune.finetune

    def spied(model: Any, normalisation: Any, train: Any, *rest: Any, **options: Any) -> Any:
        views.append(train.view)
        return original(model, normalisation, train, *rest, **options)

    monkeypatch.setattr(finetune, "finetune", spied)
    command = ["evaluate", str(run), *FINETUNE, "--finetune.crop-scale", "[0.7, 0.9]"]
    assert main([*command, "--out", str(run / "one")]) == 0
    config = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(config.replace("flip: null", "flip: false"), encoding="utf-8")
    assert main([*command, "--out", str(run / "two")]) == 0
    assert [(view.crop_scale, view.flip) for view in views] == [((0.7, 0.9), True), ((0.7, 0.9), False)]


def test_random_weights_have_a_name_of_their_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), *FINETUNE, "--init", "random"]) == 0
    output = capsys.readouterr().out
    assert "note: trained from random weights" in output
    record = load_run(run).evaluations[-1]
    assert record["options"]["finetune"]["init"] == "random"
    assert {"finetune_random", "finetune_random_low"} <= record["results"][0]["figures"].keys()
    assert "finetune" not in record["results"][0]["figures"]
    assert (run / "finetune-random" / "model.safetensors").exists()


def test_few_labels_in_several_draws(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--labels-per-class", "3", "--draws", "2"]
    assert main(["evaluate", str(run), *FINETUNE, *few]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["fine-tuned"])
    assert "±" in row
    result = load_run(run).evaluations[-1]["results"][0]
    draws = result["details"]["finetune"]["draws"]
    assert result["figures"]["finetune"] == pytest.approx(sum(draws) / 2)
    assert result["figures"]["finetune_std"] == pytest.approx(abs(draws[0] - draws[1]) / 2**0.5)
    assert result["figures"]["finetune_images"] == 30
    out = run / "finetune-pretrained-3-per-class"
    weights = [load_classifier(out / name)[0].head.weight for name in ("draw-0", "draw-1")]
    assert not torch.equal(*weights)
    # A draw that is missing is made anew, one that is there is only measured.
    shutil.rmtree(out / "draw-1")
    before = (out / "draw-0" / "finetune.json").stat().st_mtime_ns
    assert main(["evaluate", str(run), *FINETUNE, *few, "--resume"]) == 0
    assert load_run(run).evaluations[-1]["results"][0]["details"]["finetune"]["draws"] == draws
    assert (out / "draw-0" / "finetune.json").stat().st_mtime_ns == before


def test_one_that_was_stopped_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["evaluate", str(run), *FINETUNE, "--out", str(run / "whole")]) == 0
    whole = load_run(run).evaluations[-1]["results"][0]
    original, calls = trainer.train_step, count(1)

    def step(*args: Any) -> Any:
        if next(calls) == 4:
            raise KeyError("killed")
        return original(*args)

    command = ["evaluate", str(run), *FINETUNE, "--finetune.checkpoint-minutes", "0", "--out", str(run / "parts")]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", step)
        with pytest.raises(KeyError, match="killed"):
            main(command)
    for _ in range(2):  # the second time it has ended
        assert main([*command, "--resume"]) == 0
        record = load_run(run).evaluations[-1]
        again = record["results"][0]
        assert {**again["figures"], "finetune_seconds": 0} == {**whole["figures"], "finetune_seconds": 0}
        assert record["options"]["resume"] is False
        assert [line["kind"] for line in lines_of(run / "parts")] == ["epoch", "epoch", "val"]


def test_a_classifier_is_no_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), *FINETUNE]) == 0
    out = run / "finetune-pretrained"
    capsys.readouterr()
    assert main(["evaluate", str(out), "--data", "digits", *QUICK]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"torchmae: {out} holds a fine-tuned classifier; give the run it was made from; ")
    assert error.count("\n") == 1
    with pytest.raises(CheckpointError, match=r"torchmae\.training\.saved_classifier\.load_classifier reads"):
        load_model(out)


def test_random_needs_a_folder_to_write_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = ["evaluate", "random", "--preset", "vit_digits", "--data", "digits", *FINETUNE, "--finetune.epochs", "1"]
    assert main(named) == 2
    assert "out is not given, and random is no folder; add --out DIR" in capsys.readouterr().err
    assert main([*named, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.json").exists()


def test_without_a_compiler_there_is_no_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    words = ["evaluate", str(run), *FINETUNE, "--finetune.compile", "true", "--device=cpu", f"--out={tmp_path / 'new'}"]
    assert main(words) == 2
    assert "apt-get install g++" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init", "pretraned"], "finetune.init is 'pretraned'; did you mean 'pretrained'?"),
        (["--finetune.epochs", "0"], "finetune.epochs is 0; it must be 1 or more"),
        (["--labels-per-class", "500"], "labels_per_class is 500 and class"),
        (["--out", "full"], "full exists already; go on with --resume, or choose another --out"),
        (["--out", "file"], "file exists and is not an empty folder; choose another --out"),
        (["--out", "nowhere", "--resume"], "nowhere holds no fine-tuning to go on with; leave --resume out to begin"),
        (["--out", "full", "--resume"], "full holds no fine-tuning to go on with"),
        (["--method", "knn", "--resume"], "resume does not apply to method 'knn'; use --method finetune"),
        (["--method", "knn", "--out", "x"], "out does not apply to method 'knn'; use --method finetune, segmentation"),
        (
            ["--method", "anomaly", "--labels-per-class", "3", "--normal", "a", "--test", "b"],
            "labels_per_class does not",
        ),
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
    Path("full").mkdir()
    Path("full", "notes.txt").touch()
    Path("file").touch()
    assert main(["evaluate", str(run), *FINETUNE, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("torchmae: ")
    assert message in error
    assert error.count("\n") == 1
    assert not Path("nowhere").exists()
    assert load_run(run).evaluations == ()


def test_pixels_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "pixels", "--preset", "vit_digits", "--data", "digits", *FINETUNE]) == 2
    assert "'pixels' has no network, which method 'finetune' needs; evaluate a run" in capsys.readouterr().err
