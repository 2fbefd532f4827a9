"""A run with another encoder than the vision transformer, from pre-training to exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import torchmae
from torchmae.cli import main
from torchmae.training.checkpoint import load_checkpoint
from torchmae.training.saved_classifier import load_classifier

QUICK = ["--threads=1", "--precision=fp32", "--progress=none"]
SMALL = ["--model.depths=[1,1,1,1]", "--model.dims=[4,6,8,8]", "--model.decoder_embed_dim=16", "--epochs=3"]
SMALL += ["--batch=20", "--eval.count=1", "--eval.images=8", "--eval.knn_train=20", "--eval.knn_val=8"]
FINETUNE = ["--finetune.epochs=1", "--finetune.batch_size=20", "--finetune.base_lr=0.1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of two classes, and a run on them."""
    folder = tmp_path_factory.mktemp("convnext")
    for i in range(56):
        path = folder / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 128 + 127 * (i % 2), (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = ["--data=images", "--data.val_size=16", "--model.preset=convnext_32", *SMALL, *QUICK]
        assert main(["pretrain", "--out=run", *options]) == 0
    return folder


@pytest.fixture(autouse=True)
def _inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def test_it_learns_by_the_recipe_for_images_of_this_size(place: Path) -> None:
    summary = json.loads((place / "run" / "summary.json").read_text())
    assert (summary["preset"], summary["patch_size"], summary["steps"]) == ("convnext_32", [8, 8], 9)
    assert "recipe: cifar10" in (place / "run" / "config.yaml").read_text()
    assert summary["loss"] < 1.5


def test_resumed_it_is_the_same() -> None:
    shutil.copytree("run", "half")
    last = load_checkpoint(Path("half/checkpoints"))
    assert last is not None
    for path in Path("half/checkpoints").glob(f"*{last.state['step']}*"):
        shutil.rmtree(path)
    before = load_checkpoint(Path("half/checkpoints"))
    assert before is not None
    assert before.state["step"] < last.state["step"]
    assert main(["pretrain", "--resume=half"]) == 0
    assert Path("half/model.safetensors").read_bytes() == Path("run/model.safetensors").read_bytes()


def test_it_starts_from_another_run() -> None:
    options = ["--data=images", "--data.val=none", "--init-from=run", "--epochs=1", "--batch=20", *QUICK]
    assert main(["pretrain", "--out=second", *options]) == 0
    assert torchmae.load("second").model.encoder.arguments == torchmae.load("run").model.encoder.arguments
    assert main(["pretrain", "--out=grey", "--data=digits", "--model.input_size=32", *options[1:]]) == 0


@pytest.mark.parametrize("method", ["knn", "linear", "finetune"])
def test_evaluate(method: str) -> None:
    options = [*FINETUNE] if method == "finetune" else []
    assert main(["evaluate", "run", "--method", method, *options, *QUICK]) == 0
    figures = [json.loads(line) for line in Path("run/evaluations.jsonl").read_text().splitlines()][-1]
    assert figures["method"] == method


def test_embed_reconstruct_and_visualize(place: Path) -> None:
    assert main(["embed", "run", "--out=features.npz", *QUICK]) == 0
    assert np.load("features.npz")["features"].shape == (56, 8)
    assert main(["reconstruct", "run", "images/a/0.png", "--out=grid.png"]) == 0
    assert (place / "grid.png").exists()
    assert main(["visualize", "run", "images/a/0.png", "--out=pca.png"]) == 0


@pytest.mark.parametrize("what", ["run", "classifier"])
def test_export_to_timm_loads_by_its_name_and_strictly(what: str) -> None:
    timm = pytest.importorskip("timm")
    source, images = what, torch.randn(2, 3, 32, 32)
    if what == "classifier":
        assert main(["evaluate", "run", "--method=finetune", "--out=classifier", *FINETUNE, *QUICK]) == 0
        wanted = load_classifier(Path("classifier"))[0](images)
    else:
        wanted = torchmae.load("run").encode(images)
    assert main(["export", source, "--to=timm", f"--out=timm-{what}"]) == 0
    config = json.loads(Path(f"timm-{what}/config.json").read_text())
    assert config["architecture"] == "convnextv2_atto"
    model = timm.create_model(f"local-dir:timm-{what}", pretrained=True).eval()
    torch.testing.assert_close(model(images), wanted, rtol=1e-4, atol=1e-5)
    grey = timm.create_model(f"local-dir:timm-{what}", pretrained=True, in_chans=1, num_classes=3)  # its cfg is right
    assert grey(images[:, :1]).shape == (2, 3)
    card = Path(f"timm-{what}/README.md").read_text()
    assert "ConvNeXt V2" in card
    assert "vision transformer" not in card


@pytest.mark.parametrize("to", ["safetensors", "onnx"])
def test_other_exports(to: str) -> None:
    if to == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(module)
    assert main(["export", "run", f"--to={to}", f"--out=out-{to}"]) == 0  # after a comparison of the outputs
    if to == "safetensors":
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(torchmae.load("out-safetensors").encode(images), torchmae.load("run").encode(images))


@pytest.mark.parametrize("to", ["hf-vit", "hf-mae", "official"])
def test_formats_of_vision_transformers_are_refused(to: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["export", "run", f"--to={to}", "--out=refused"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(name in error for name in ("timm", "safetensors", "onnx"))
    assert not Path("refused").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("pretrain --model.preset convnext_32 --model.embed_dim 8", "does not apply to preset 'convnext_32'"),
        ("pretrain --model.preset convnext_32 --model.depths [1,1]", "give both one number for each stage"),
        ("pretrain --model.preset convnext_32 --model.patch_size 4", "use multiples of 8"),
        ("plan --model convnext_atto", "plan a transformer"),
    ],
)
def test_mistakes(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
