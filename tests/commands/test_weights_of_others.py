"""Commands that take weights of others in the place of a run: `--init-from FILE`, `--target`, and where results go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_run import write_others_weights, write_run

from torchmae.cli import main

QUICK = ["--threads", "1", "--precision", "fp32", "--progress", "none"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mae.pth, and ten images of each of two classes in good/ and odd/."""
    folder = tmp_path_factory.mktemp("others")
    write_others_weights(folder / "mae.pth")
    random = np.random.default_rng(0)
    for name in ("good", "odd"):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(10):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("command", ["evaluate", "embed", "reconstruct", "visualize"])
def test_help_names_the_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert "--init-from" in shown
    assert ("--target" in shown) == (command != "embed")


@pytest.mark.parametrize("target", ["pixels", "normalised"])
def test_anomaly_knows_the_target_that_it_is_told(
    target: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ["--normal", str(place / "images" / "good"), "--test", str(place / "images")]
    words = ["evaluate", "--init-from", str(place / "mae.pth"), "--method", "anomaly", *images, *QUICK]
    assert main([*words, "--out", str(tmp_path / "out"), "--target", target]) == 0
    assert "AUROC" in capsys.readouterr().out
    scores = (tmp_path / "out" / "anomaly_scores.csv").read_text(encoding="utf-8")
    assert len(scores.splitlines()) > 10
    assert main([*words, "--out", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert "say it with --target normalised" in said and said.count("\n") == 1


def test_reconstruction_differs_by_target(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("skimage.metrics", reason="pip install 'torchmae[eval]'")
    words = ["evaluate", str(place / "mae.pth"), "--method", "reconstruction", "--data", str(place / "images"), *QUICK]
    printed = []
    for target in ("pixels", "normalised"):
        options = ["--reconstruction.ratios", "[0.75]", "--reconstruction.images", "2", "--target", target]
        assert main([*words, *options]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] != printed[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "finetune", "--data", "IMAGES"], "out is not given, and FILE is no folder; add --out DIR"),
        (
            ["--method", "anomaly", "--normal", "IMAGES/good", "--test", "IMAGES"],
            "out is not given, and FILE is no folder; add --out DIR",
        ),
        (
            ["--method", "knn", "--target", "pixels"],
            "target does not apply to method 'knn'; use --method reconstruction or anomaly",
        ),
        (
            ["--method", "reconstruction", "--target", "pixel"],
            "target is 'pixel'; did you mean 'pixels'? choose from pixels, normalised",
        ),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(
    words: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [word.replace("IMAGES", str(place / "images")) for word in words]
    before = sorted(place.rglob("*"))
    assert main(["evaluate", "--init-from", str(place / "mae.pth"), *named, *QUICK]) == 2
    assert capsys.readouterr().err == f"torchmae: {message.replace('FILE', str(place / 'mae.pth'))}\n"
    assert sorted(place.rglob("*")) == before


def test_a_run_says_its_target_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a")
    for words in ([str(run)], ["random", "--preset", "vit_digits", "--data", "digits"]):
        assert main(["evaluate", *words, "--method", "reconstruction", "--target", "pixels", *QUICK]) == 2
        said = capsys.readouterr().err
        assert said.startswith("torchmae: target is given and ") and said.endswith("; leave --target out\n")


def test_a_picture_by_ratios_takes_a_target(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, out = str(place / "images" / "good" / "0.png"), tmp_path / "x.png"
    words = ["visualize", image, "--init-from", str(place / "mae.pth"), "--kind", "ratios", "--out", str(out)]
    assert main([*words, "--target", "pixels"]) == 0
    assert out.is_file()
    out.unlink()
    assert main(words) == 2
    assert "say it with --target normalised" in capsys.readouterr().err
    assert not out.exists()
