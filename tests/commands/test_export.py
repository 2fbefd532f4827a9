"""`torchmae export` and `push`, and weights of others where a command takes a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_run import write_run

from torchmae import presets
from torchmae.cli import main
from torchmae.interop import names
from torchmae.training.pretrained import load

QUICK = ["--threads", "1", "--precision", "fp32", "--progress", "none"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "a")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_released(tmp_path_factory.mktemp("released") / "mae_full.pth", in_chans=3)


def write_released(path: Path, in_chans: int) -> Path:
    """A file in the released checkpoints' layout, of sizes whose heads are known."""
    sizes = {"embed_dim": 192, "num_heads": 3, "decoder_embed_dim": 512, "decoder_num_heads": 16}
    torch.manual_seed(0)
    model = presets.build("vit_digits", depth=1, decoder_depth=1, in_chans=in_chans, **sizes)
    torch.save({"model": names.to_official(model.state_dict())}, path)
    return path


def test_an_export_says_what_was_checked(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run), "--to", "official", "--out", str(out), "--data-licence", "CC0"]) == 0
    check, written = capsys.readouterr().out.splitlines()
    assert check.startswith("check: read back: predictions, largest difference 0.0e+00")
    assert written == f"{out}  (README.md, checkpoint.pth)"
    assert main(["export", str(run), "--to", "official", "--out", str(out)]) == 2
    assert "exists already; remove it, or choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "tim", "--out", "x"], "to is 'tim'; did you mean 'timm'? choose from timm, hf-mae, hf-vit"),
        (["--to", "timm"], "not given: --out"),
        (["--to", "timm", "--out", "x", "--part", "reconstruction"], "part is 'reconstruction'"),
        (["--to", "timm", "--out", "x.pth"], "an export is a folder of files: give a name without suffix"),
        (["--out", "x", "--target", "pixels"], "says what it was; leave --target out"),
    ],
)
def test_wrong_options(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_push_to_no_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run), "model"]) == 2
    assert capsys.readouterr().err == "torchmae: repo is 'model'; give user/name\n"


def test_a_run_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "holds no model: cannot read model.json" in capsys.readouterr().err


def test_others_weights_reconstruct_once_their_target_is_said(
    released: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid.png"
    command = ["reconstruct", "--init-from", str(released), str(picture), "--out", str(out)]
    assert main(command) == 2
    assert "does not say what its decoder's target was; say it with --target normalised" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--target", "pixels"]) == 0
    assert capsys.readouterr().out == f"{out}  (masked patches as predicted)\n"
    assert main([*command, "--target", "normalised"]) == 0
    assert "true mean and contrast" in capsys.readouterr().out


def test_an_encoder_alone_does_not_reconstruct(
    run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    assert main(["export", str(run), "--to", "timm", "--out", str(tmp_path / "timm")]) == 0
    capsys.readouterr()
    assert main(["reconstruct", str(tmp_path / "timm"), str(picture), "--out", str(tmp_path / "x.png")]) == 2
    assert "this model cannot reconstruct: " in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_others_weights_embed_and_are_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    released, out = write_released(tmp_path / "mae.pth", in_chans=1), tmp_path / "features.npz"
    assert main(["embed", "--init-from", str(released), "--data", "digits", "--out", str(out), *QUICK]) == 0
    assert capsys.readouterr().out == f"{out}  (1,797 x 192 features)\n"
    options = ["--data", "digits", "--method", "knn", "--train-images", "200", "--test-images", "100", "--json"]
    assert main(["evaluate", "--init-from", str(released), *options, *QUICK]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]["model"]
    assert 0 <= figures["knn20"] <= 100
    assert {item.name for item in tmp_path.iterdir()} == {"mae.pth", "features.npz"}


def test_pre_training_starts_from_others_weights(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "run", tmp_path / "grey.npy"
    np.save(data, np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8))
    still = ["--optim.lr", "1e-12", "--optim.muon_lr", "1e-12"]
    options = [*still, "--data", str(data), "--epochs", "1", "--batch", "30", "--data.val", "none"]
    command = ["pretrain", "--init-from", str(released), "--out", str(out), *options, "--threads", "1"]
    assert main([*command, "--precision", "fp32", "--progress", "plain"]) == 0
    said = "".join(capsys.readouterr())
    assert f"encoder: 18 tensors from {released}" in said
    assert "patch embedding: adapted from 3 to 1 channels (summed)" in said
    assert "decoder: starts fresh (the source predicts 3 channels and the data has 1)" in said
    theirs, ours = torch.load(released, weights_only=True)["model"], load_file(out / "model.safetensors")
    expected = theirs["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(ours["encoder.patch_embed.proj.weight"], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        ours["encoder.blocks.0.attn.qkv.weight"], theirs["blocks.0.attn.qkv.weight"], rtol=0, atol=1e-6
    )
    description = load(out).description.arguments
    assert (description["embed_dim"], description["num_heads"], description["in_chans"]) == (192, 3, 1)
    # A run that has started no longer needs the file that it started from.
    config = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(config.replace(str(released), str(tmp_path / "gone.pth")))
    assert main(["pretrain", "--resume", str(out), "--progress", "none"]) == 0
