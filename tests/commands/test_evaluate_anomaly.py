"""`torchmae evaluate --method anomaly`: figures, files, records, and mistakes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_run import write_run

from torchmae.cli import main
from torchmae.config import DataConfig, PretrainConfig
from torchmae.evaluation import anomaly
from torchmae.report.metrics import measure_of
from torchmae.report.run import load_run
from torchmae.settings import to_yaml

ANOMALY = ["--method", "anomaly", "--threads", "1", "--precision", "fp32", "--progress", "none"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "a")


@pytest.fixture(autouse=True)
def _images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dark images are normal, of one kind without labels and of two with; bright ones are not."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    dark = ("flat", "normal/cat", "normal/dog", "fine/cat", "fine/dog", "test/good", "test/cat")
    bright = ("test/scratch", "strange/crack", "strange/hole")
    for name in (*dark, *bright):
        low, high = (0, 60) if name in dark else (150, 255)
        Path(name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(random.integers(low, high, (8, 8), dtype=np.uint8)).save(Path(name, f"{i}.png"))


def test_figures_files_and_their_record(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), *ANOMALY, "--normal", "normal", "--test", "test", "--json"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "16 normal images, 24 to test, 8 of them anomalous" in printed
    assert f"note: pictures/anomaly.png and anomaly_scores.csv are in {run}" in printed
    record = load_run(run).evaluations[-1]
    figures = record["results"][0]["figures"]
    assert json.loads(printed[-1])["figures"]["model"] == figures
    beside = [result["figures"] for result in record["results"][1:]]
    assert [result["subject"] for result in record["results"]] == ["model", "random", "pixels"]
    for name, value in figures.items():
        row = next(line for line in printed if line.strip().startswith(f"{measure_of(name).label}  "))
        values = [value, *(other[name] for other in beside if name in other)]
        assert row.split()[-len(values) :] == [f"{value:.3f}" for value in values]
    assert "anomaly_reconstruction" in figures.keys() - beside[0].keys()
    assert figures["anomaly_knn"] > 0.9  # which a network that learned nothing can tell too
    assert (record["method"], record["options"]["normal"], record["options"]["test"]) == ("anomaly", "normal", "test")
    assert record["data"]["classes"] == ["normal", "anomalous"]
    assert (record["data"]["train_images"], record["data"]["test_images"]) == (16, 24)
    with (run / "anomaly_scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["anomalous"] for row in rows if "scratch" in row["path"]] == ["1"] * 8
    assert sum(int(row["anomalous"]) for row in rows) == 8
    with Image.open(run / "pictures" / "anomaly.png") as picture:
        assert picture.width > 100


def test_normal_images_need_no_labels_and_may_be_chosen(run: Path) -> None:
    command = ["evaluate", str(run), *ANOMALY, "--test", "test"]
    assert main([*command, "--normal", "flat", "--out", "elsewhere"]) == 0
    assert (Path("elsewhere") / "anomaly_scores.csv").exists()
    assert not (run / "anomaly_scores.csv").exists()
    # Now good and dog are not normal either.
    for names, normal, anomalous in (("cat", 8, 16), ("cat, dog", 16, 16)):
        assert main([*command, "--normal", "normal", "--normal-classes", names]) == 0
        assert load_run(run).evaluations[-1]["data"]["train_images"] == normal
        with (run / "anomaly_scores.csv").open(encoding="utf-8", newline="") as file:
            assert sum(int(row["anomalous"]) for row in csv.DictReader(file)) == anomalous


def test_other_images_are_read_as_the_runs(run: Path) -> None:
    config = PretrainConfig(data=DataConfig(truncated="keep", root="elsewhere"))
    (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert main(["evaluate", str(run), *ANOMALY, "--normal", "normal", "--test", "test"]) == 0
    read = load_run(run).evaluations[-1]["options"]["data"]
    assert (read["truncated"], read["root"], read["source"]) == ("keep", "data", None)


def test_the_share_that_is_hidden_is_that_of_training(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = []
    original = anomaly.patch_errors

    def spied(model: Any, images: Any, noise: Any, ratio: float, *others: Any) -> Any:
        ratios.append(ratio)
        return original(model, images, noise, ratio, *others)

    monkeypatch.setattr(anomaly, "patch_errors", spied)
    description = json.loads((run / "model.json").read_text(encoding="utf-8"))
    description["mask"]["ratio"] = 0.5
    (run / "model.json").write_text(json.dumps(description), encoding="utf-8")
    assert main(["evaluate", str(run), *ANOMALY, "--normal", "normal", "--test", "test"]) == 0
    assert set(ratios) == {0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "strange"], "which of its classes are normal is not known (crack, hole); give --normal-classes"),
        (["--normal", "normal"], "method anomaly has no test images; give --normal DIR --test DIR, or --data DIR"),
        (["--test", "test"], "method anomaly has no normal images; give --normal DIR --test DIR, or --data DIR"),
        (["--normal", "normal", "--test", "test", "--data", "test"], "data is 'test' and normal 'normal'; give one"),
        (["--data", "test", "--test-data", "val"], "test_data does not apply to method 'anomaly'"),
        (["--normal", "normal", "--test", "normal"], "leads to the training images"),
        (
            ["--normal", "normal", "--test", "strange"],
            "the test images are all anomalous: their classes are crack, hole",
        ),
        (["--normal", "normal", "--test", "fine"], "the test images are all normal: their classes are cat, dog"),
        (["--normal", "normal", "--test", "flat"], "the test images have no classes"),
        (["--normal", "normal", "--test", "nowhere"], "'nowhere' is neither a path nor the name of a data set"),
        (["--normal", "normal", "--test", "test", "--normal-classes", "cow"], "is called 'cow'; choose from cat, dog"),
        (["--method", "knn", "--normal", "normal"], "normal does not apply to method 'knn'; use --method anomaly"),
    ],
)
def test_mistakes_end_in_one_line(
    run: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), *ANOMALY, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("torchmae: ")
    assert message in error
    assert error.count("\n") == 1
    assert load_run(run).evaluations == ()


def test_pixels_and_random_have_features_but_predict_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    given = [*ANOMALY, "--preset", "vit_digits", "--normal", "normal", "--test", "test"]
    for name in ("pixels", "random"):
        assert main(["evaluate", name, *given]) == 2
        assert f"out is not given, and {name} is no folder" in capsys.readouterr().err
        assert main(["evaluate", name, *given, "--out", name, "--json"]) == 0
        (figures,) = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"].values()
        assert figures.keys() == {"anomaly_knn", "anomaly_patch_knn", "anomaly_patch_knn_max"}
