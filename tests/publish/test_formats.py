from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saved_folders import classifier_folder, run_folder
from tiny_models import MEAN

import torchmae
from torchmae import presets
from torchmae.cli import main
from torchmae.config.export import ExportOptions
from torchmae.errors import CheckpointError, ConfigError
from torchmae.nn.masking import random_mask
from torchmae.publish import timm as timm_format
from torchmae.publish.export import EXPORTS, export
from torchmae.publish.exports import Check, compare
from torchmae.report.metrics import METRICS, Metric, Unit
from torchmae.training.saved_classifier import load_classifier, save_classifier
from torchmae.training.saved_model import Description, write_description, write_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("runs") / "a")


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier_folder(tmp_path_factory.mktemp("runs") / "c")


def test_timm_loads_it_and_fine_tunes_it(run: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    made = export(run, tmp_path / "out", ExportOptions(to="timm"))
    assert made.files == ("README.md", "config.json", "model.safetensors")
    assert made.check.passed and "timm" in str(made.check)
    images = torch.randn(2, 3, 16, 16)
    features = torchmae.load(run).encode(images)
    with torch.no_grad():
        model = timm.create_model(f"local-dir:{made.path}", pretrained=True).eval()
        torch.testing.assert_close(model(images), features, rtol=1e-5, atol=1e-5)
    assert tuple(model.pretrained_cfg["mean"]) == MEAN
    tuned = timm.create_model(f"local-dir:{made.path}", pretrained=True, num_classes=7)
    assert tuned(images).shape == (2, 7)
    assert torch.equal(tuned.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_size": (16, 24), "patch_size": (4, 8)},
        {"class_token": False},
        {"registers": 3},
        {"in_chans": 1},
        {"decoder": "cross"},
        {"embed_dim": 30, "num_heads": 2, "mlp_ratio": 2.7},
    ],
    ids=["not square", "no class token", "registers", "grey", "cross decoder", "odd widths"],
)
def test_timm_takes_any_encoder_of_images(tmp_path: Path, arguments: Any) -> None:
    pytest.importorskip("timm")
    export(run_folder(tmp_path / "run", **arguments), tmp_path / "out", ExportOptions(to="timm"))
    loaded = torchmae.load(tmp_path / "out")
    images = torch.randn(1, loaded.model.encoder.in_chans, *loaded.description.input_size)
    assert torch.equal(loaded.encode(images), torchmae.load(tmp_path / "run").encode(images))


@pytest.mark.parametrize("to", ["hf-mae", "official", "safetensors"])
def test_a_whole_model_comes_back_the_same(run: Path, tmp_path: Path, to: str) -> None:
    if to == "hf-mae":
        pytest.importorskip("transformers")
    made = export(run, tmp_path / "out", ExportOptions(to=to))
    path = made.path / "checkpoint.pth" if to == "official" else made.path
    ours, again = torchmae.load(run), torchmae.load(path)
    assert again.description.mean == MEAN
    images = torch.randn(2, 3, 16, 16)
    mask = random_mask(torch.rand(2, 16), (4, 4), 0.75)
    assert torch.equal(again.reconstruct(images, mask).images, ours.reconstruct(images, mask).images)
    assert again.description.arguments["norm_pix"] is True
    assert again.notes == ()


OTHER = """
import sys, torch, transformers
from pathlib import Path
folder = Path(sys.argv[1])
images, noise, loss, tokens = torch.load(sys.argv[2], weights_only=True)
for kind, name, options in (("ViTMAEForPreTraining", "mae", {}), ("ViTModel", "vit", {"add_pooling_layer": False})):
    model, report = getattr(transformers, kind).from_pretrained(folder / name, output_loading_info=True, **options)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem], (kind, problem, report[problem])
    model.eval()
    with torch.no_grad():
        if name == "mae":
            assert abs(model(images, noise=noise).loss.item() - loss.item()) < 1e-5
        else:
            assert (model(images).last_hidden_state - tokens).abs().max() < 1e-4
print(transformers.__version__)
"""


def test_transformers_of_any_version_load_it(run: Path, tmp_path: Path) -> None:
    """The installed version, and one more where TORCHMAE_OTHER_TRANSFORMERS names a folder to import it from."""
    pytest.importorskip("transformers")
    export(run, tmp_path / "mae", ExportOptions(to="hf-mae"))
    export(run, tmp_path / "vit", ExportOptions(to="hf-vit"))
    processor = json.loads((tmp_path / "mae" / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == list(MEAN)
    model = torchmae.load(run).model
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    with torch.no_grad():
        loss = model(images, random_mask(noise, (4, 4), 0.6)).loss
        encoded = model.encoder(images)
    torch.save((images, noise, loss, torch.cat([encoded.prefix, encoded.patches], 1)), tmp_path / "expected.pt")
    for extra in ("", os.environ.get("TORCHMAE_OTHER_TRANSFORMERS", "")):
        ran = subprocess.run(
            [sys.executable, "-c", OTHER, str(tmp_path), str(tmp_path / "expected.pt")],
            env={**os.environ, "PYTHONPATH": extra},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        if not os.environ.get("TORCHMAE_OTHER_TRANSFORMERS"):
            break


def test_onnx_of_the_whole_reconstruction(run: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    made = export(run, tmp_path / "out", ExportOptions(to="onnx", part="reconstruction"))
    session = onnxruntime.InferenceSession(made.path / "model.onnx")
    images, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    filled, hidden = session.run(None, {"images": images.numpy(), "noise": noise.numpy()})
    expected = torchmae.load(run).reconstruct(images, random_mask(noise, (4, 4), 0.6))
    np.testing.assert_allclose(filled, expected.images.numpy(), atol=1e-5)
    assert (hidden == expected.removed.numpy()).all()


def test_a_classifier_with_its_labels(fine_tuned: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    onnxruntime = pytest.importorskip("onnxruntime")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        logits = load_classifier(fine_tuned)[0](images)
        made = export(fine_tuned, tmp_path / "timm", ExportOptions(to="timm"))
        theirs = transformers.AutoModelForImageClassification.from_pretrained(made.path).eval()
        torch.testing.assert_close(theirs(images).logits, logits, rtol=1e-5, atol=1e-5)
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "a|b"}
    export(fine_tuned, tmp_path / "onnx", ExportOptions(to="onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], logits.numpy(), atol=1e-5)
    export(fine_tuned, tmp_path / "own", ExportOptions(to="safetensors"))
    model, description = load_classifier(tmp_path / "own")
    with torch.no_grad():  # with gradients, attention takes another way and rounds otherwise
        assert torch.equal(model(images), logits)
    assert description.classes == ("cat", "dog", "a|b")
    assert "2. a/b" in (tmp_path / "own" / "README.md").read_text()


@pytest.mark.parametrize("to", ["hf-mae", "official", "hf-vit"])
def test_what_a_classifier_cannot_become(fine_tuned: Path, tmp_path: Path, to: str) -> None:
    with pytest.raises(ConfigError, match="use --to timm"):
        export(fine_tuned, tmp_path / "out", ExportOptions(to=to))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "to", "message"),
    [
        ({"decoder": "cross"}, "hf-mae", r"a decoder that is not the paper's .*; use --to timm, hf-vit, onnx, safe"),
        ({"decoder": "cross"}, "official", "a decoder that is not the paper's .*; use --to timm, hf-vit, onnx, safe"),
        ({"class_token": False}, "hf-mae", "no class token; use --to timm, onnx, safetensors"),
        ({"registers": 2}, "hf-vit", "registers; use --to timm, onnx, safetensors"),
        ({"input_size": (16, 24)}, "official", "images of 16x24, which are not square; use --to timm"),
        ({"patch_size": (4, 8)}, "hf-vit", "patches of 4x8, which are not square; use --to timm"),
        ({"input_size": (16,), "patch_size": (4,)}, "timm", "inputs of 1 axis; use --to onnx, safetensors"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(tmp_path: Path, arguments: Any, to: str, message: str) -> None:
    run = run_folder(tmp_path / "run", **arguments)
    with pytest.raises(ConfigError, match=message):
        export(run, tmp_path / "new" / "out", ExportOptions(to=to))
    assert not (tmp_path / "new" / "out").exists()
    assert not list(tmp_path.rglob(".writing*"))


def test_a_failed_check_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    right = timm_format.save_tensors

    def wrong(path: Path, weights: dict[str, torch.Tensor]) -> None:
        right(path, {**weights, "norm.bias": weights["norm.bias"] + 0.001})

    monkeypatch.setattr(timm_format, "save_tensors", wrong)
    with pytest.raises(CheckpointError, match="deleted, since it is not the model: timm .* largest difference"):
        export(run, tmp_path / "out", ExportOptions(to="timm"))
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_exists_is_touched(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists already; remove it, or choose another --out"):
        export(run, tmp_path / "out", ExportOptions())
    assert (tmp_path / "out" / "a.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"an export is a folder of files: give a name without suffix"):
        export(run, tmp_path / "model.onnx", ExportOptions(to="onnx"))
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty", ExportOptions())
    with pytest.raises(CheckpointError, match=r"cannot write .*: File exists; free space or mend the folder"):
        export(run, tmp_path / "out" / "a.txt" / "b", ExportOptions())


def test_the_card_says_what_is_known(run: Path, tmp_path: Path) -> None:
    made = export(run, tmp_path / "out", ExportOptions(data_licence="CC0 | mine"))
    card = (made.path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: torchmae\n")
    for part in (
        "digits",
        "1,234 images",
        "7 of 256 images",
        "60% of the patches",
        "0.4321",
        "CC0 / mine",
        "read back",
    ):
        assert part in card
    assert "kNN" not in card
    again = export(tmp_path / "out", tmp_path / "second", ExportOptions())
    assert "Nothing is known about the training." in (again.path / "README.md").read_text()


def test_the_card_of_a_classifier_says_how_values_are_scaled(fine_tuned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    model, known = load_classifier(fine_tuned)
    ends = (0.0, 0.0, 0.0), (0.5, 0.5, 0.5)
    scaled = replace(known, low=ends[0], high=ends[1], scale={"uint16": 4095.0, "uint8": 255.0}, normalise="dataset")
    folder.mkdir()
    save_classifier(folder, model, scaled)
    assert load_classifier(folder)[1] == scaled
    card = (export(folder, tmp_path / "out", ExportOptions(to="onnx")).path / "README.md").read_text()
    assert "uint16 divided by 4095 or uint8 divided by 255; values below (-0.5, -0.5, -0.5) and above (1, 1, 1)" in card
    assert "multiply uint8 by 16.0588 to get values as of uint16" in card


def test_a_figure_from_outside_is_on_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "iou", Metric("Mean IoU", Unit("IoU, %", "{:.2f}".format), goal="features"))
    run = run_folder(tmp_path / "run")
    (run / "summary.json").write_text('{"iou": 41.5}')
    assert "| Mean IoU | 41.50 |" in (export(run, tmp_path / "out", ExportOptions()).path / "README.md").read_text()


def test_the_python_of_the_card_runs(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    made = export(run, tmp_path / "out", ExportOptions(to="timm"))
    code = (made.path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    values: dict[str, Any] = {"images": torch.randn(1, 3, 16, 16)}
    exec(code.replace("FOLDER", str(made.path)), values)
    assert torch.equal(values["model"].eval()(values["images"]), values["features"])


def test_an_encoder_of_others_is_exported_without_its_decoder(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    made = export(run, tmp_path / "a", ExportOptions(to="timm"))
    for to in ("safetensors", "hf-mae"):
        with pytest.raises(ConfigError, match="holds an encoder only; use --to timm, hf-vit, onnx$"):
            export(made.path, tmp_path / "b", ExportOptions(to=to))
    export(made.path, tmp_path / "c", ExportOptions(to="timm"))
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == (made.path / "model.safetensors").read_bytes()


def test_the_mlp_model_has_one_format(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    arguments = presets.arguments("mlp", input_size=(8, 8), in_chans=1, hidden_dim=12)
    write_description(tmp_path / "run" / "model.json", Description(arguments, (0.5,), (0.5,), {}, None, "0.1.0"))
    write_weights(tmp_path / "run" / "model.safetensors", presets.construct(arguments).state_dict())
    with pytest.raises(ConfigError, match="an encoder of another kind; use --to safetensors"):
        export(tmp_path / "run", tmp_path / "out", ExportOptions(to="onnx"))
    assert export(tmp_path / "run", tmp_path / "out", ExportOptions()).check.difference == 0


def test_an_encoder_that_a_format_does_not_name_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = EXPORTS["hf-vit"].holds
    other = EXPORTS["hf-vit"]._replace(holds=replace(held, encoders=("convnext",)))
    monkeypatch.setitem(EXPORTS, "hf-vit", other)
    with pytest.raises(ConfigError, match="hf-vit .* an encoder of another kind; use --to timm"):
        export(run, tmp_path / "out", ExportOptions(to="hf-vit"))


def test_a_reconstruction_needs_a_decoder_and_a_format_for_it(fine_tuned: Path, run: Path, tmp_path: Path) -> None:
    for path, to in ((fine_tuned, "onnx"), (run, "timm")):
        with pytest.raises(ConfigError, match="leave --part out"):
            export(path, tmp_path / "out", ExportOptions(to=to, part="reconstruction"))


def test_two_exports_do_not_write_into_each_other(run: Path, tmp_path: Path) -> None:
    code = "import sys; from torchmae.files import lock_file; from pathlib import Path\n"
    code += "held = lock_file(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    other = [sys.executable, "-c", code, str(tmp_path / ".writing-out.lock")]
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 2
        with pytest.raises(ConfigError, match=r"another command is writing .*out; wait for it, or choose another"):
            export(run, tmp_path / "out", ExportOptions())
        assert [path.name for path in tmp_path.iterdir()] == [".writing-out.lock"]
        process.communicate()
    assert export(run, tmp_path / "out", ExportOptions()).check.difference == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_check_is_passed_by_what_is_equal_up_to_rounding() -> None:
    one = torch.tensor([3.0, -200.0])
    assert compare("x", "values", one + 0.01, one).passed
    assert not compare("x", "values", one + 0.03, one).passed
    assert not compare("x", "values", one[:1], one).passed
    assert not compare("x", "values", one * torch.nan, one).passed
    assert str(Check("x", "values", 1e-5, 2.0)) == "x: values, largest difference 1.0e-05 (of values up to 2)"
