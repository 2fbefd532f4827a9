"""Commands that take weights of others in the place of a run: `--init-from FILE`, `--target`, and where results go."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import write_others_weights, write_run

from torchmae.cli import main
from torchmae.nn.encoder import ViTEncoder
from torchmae.training.pretrained import load

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
    assert main([command, "--help"]) == 0
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


def test_a_part_of_a_file_whose_size_is_said_is_trained_and_resumed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher of two encoders of clips, whose positions do not show their grid, on pictures."""
    sizes = {"input_size": (3, 32, 32), "patch_size": (1, 8, 8), "in_chans": 3, "embed_dim": 192, "num_heads": 3}
    encoder = ViTEncoder(**sizes, depth=1).state_dict()
    teacher = {f"module.backbone.{name}": value + 0.5 for name, value in encoder.items()}
    torch.save({"student": encoder, "teacher": teacher, "best": np.float64(0.7)}, tmp_path / "x.pth")
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 1}
    words = ["pretrain", "--data", str(place / "images"), "--recipe", "cifar10", "--out", str(tmp_path / "a")]
    words += [f"--model.{name}={value}" for name, value in decoder.items()]
    words += ["--model.preset", "vit_tiny", "--epochs", "1", "--eval.count", "1", "--model.input_size", "[32, 32]"]
    words += [word if word != "none" else "plain" for word in QUICK]
    assert main([*words, "--init-from", str(tmp_path / "x.pth")]) == 2
    assert "holds 2 encoders: student, teacher; choose one:" in capsys.readouterr().err
    assert main([*words, "--init-from", f"{tmp_path / 'x.pth'}#teacher"]) == 0
    printed = capsys.readouterr().err
    said = ("taken from teacher.module.backbone of the file", "not used: student", "positions of the first of 3 frames")
    assert all(line in printed for line in said)
    assert load(tmp_path / "a").description.arguments["patch_size"] == (8, 8)
    (tmp_path / "x.pth").unlink()
    assert main(["pretrain", "--resume", str(tmp_path / "a")]) == 0


def test_a_network_of_timm_is_evaluated_like_a_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timm = pytest.importorskip("timm")
    create = timm.create_model
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    monkeypatch.setattr(
        timm, "create_model", lambda name, **given: create(name, **{**given, "pretrained": False, **small})
    )
    torch.manual_seed(0)
    name, images = "timm:vit_small_patch14_reg4_dinov2", place / "images"
    loaded = load(name)
    assert (loaded.model.encoder.num_prefix_tokens, loaded.model.pools) == (5, ("mean", "cls", "both"))
    assert loaded.description.mean == pytest.approx((0.485, 0.456, 0.406))
    batch = loaded.preprocess(images)
    theirs = loaded.model.encoder.network.forward_features(batch)
    torch.testing.assert_close(loaded.encode(batch, "cls"), theirs[:, 0])
    torch.testing.assert_close(loaded.encode(batch), theirs[:, 5:].mean(1))
    words = ["--data", str(images), "--method", "knn,linear", "--labels-per-class", "2", "--draws", "1"]
    assert main(["evaluate", name, *words, "--json", str(tmp_path / "a.json"), *QUICK]) == 0
    figures = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["figures"]
    assert figures.keys() == {"model", "random", "pixels"}
    assert all("knn20" in of_subject for of_subject in figures.values())
    anomaly = ["--method", "anomaly", "--normal", str(images / "good"), "--test", str(images)]
    anomaly += ["--out", str(tmp_path / "b")]
    assert main(["evaluate", name, *anomaly, *QUICK]) == 0
    assert "reconstruction" not in (tmp_path / "b" / "anomaly_scores.csv").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["reconstruct", name, str(images / "good" / "0.png"), "--out", str(tmp_path / "c.png"), *QUICK]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert main(["evaluate", "timm:resnet18", "--data", str(images), *QUICK]) == 2
    assert "timm cannot make 'resnet18'" in capsys.readouterr().err
