from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import torchmae
from torchmae import presets
from torchmae.api import configure
from torchmae.building import overrides
from torchmae.config import MaskConfig, PretrainConfig
from torchmae.config.base import make, settings_of
from torchmae.errors import ConfigError, TrainingError
from torchmae.report.table import final_table
from torchmae.runs import MAY_CHANGE, Run
from torchmae.settings import collect, read_config, values_of
from torchmae.training import runtime, trainer
from torchmae.training.checkpoint import load_checkpoint

SMALL: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 8,
    "threads": 1,
    "progress": "none",
    "eval": {"count": 2, "images": 12, "knn_train": 20, "knn_val": 10},
}
TINY_VIT = {
    "preset": "vit_digits", "depth": 1, "embed_dim": 16, "decoder_embed_dim": 16, "decoder_depth": 1, "num_heads": 2
}  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def array_file(path: Path, *shape: int, labels: bool = False) -> str:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if labels:
        np.savez(path, images=images, labels=np.arange(len(images)) % 3)
    else:
        np.save(path, images)
    return str(path)


def records(run: Run, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_settings_as_dictionaries(place: Path) -> None:
    file = array_file(place / "images.npz", 40, 8, 8, 3, labels=True)
    torch.set_num_threads(2)
    before = torch.get_rng_state()
    run = torchmae.pretrain(
        data={"source": file, "flip": False}, mask={"ratio": 0.5}, model=TINY_VIT, out="a", recipe="digits", **SMALL
    )
    assert torch.equal(torch.get_rng_state(), before)  # the caller's, as is the number of threads
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert (run.path, run.report) == (Path("a"), Path("a/report.html"))
    assert run.report.read_text().startswith("<!doctype html>")
    config = read_config(Path("a/config.yaml"))
    assert (config.mask, config.data.source, config.data.flip) == (MaskConfig(ratio=0.5), file, False)
    assert config.model.embed_dim == 16
    figures = run.figures
    assert figures == json.loads(Path("a/summary.json").read_text())
    expected = {"state": "finished", "steps": 4, "num_train": 32, "num_val": 8, "in_chans": 3, "mask_ratio": 0.5}
    assert {name: figures[name] for name in expected} == expected
    assert figures["images_seen"] == 32
    assert 0 <= figures["knn"] <= 100
    baselines = {f"{key}_{of}" for key in ("knn", "linear") for of in ("pixels", "untrained")}
    (baseline,) = records(run, "baseline")
    assert baseline.keys() == {"kind", "step", "effective_rank_untrained", "majority", "majority_images", *baselines}
    assert all(figures[name] == baseline[name] for name in baselines)
    assert figures["linear"] == records(run, "val")[-1]["linear"]
    assert figures["loss"] == records(run, "val")[-1]["loss"]
    assert [line["step"] for line in records(run, "val")] == [2, 4]

    loaded = torchmae.load("a")
    images = np.load(file)["images"]
    batch = loaded.preprocess(*images[:5])
    assert batch.shape == (5, 3, 8, 8)
    assert loaded.description.classes is None
    assert loaded.encode(batch).shape == (5, 16)
    assert loaded.mask(5).ids_masked.shape == (5, 8)
    assert loaded.reconstruct(batch, loaded.mask(5)).images.shape == batch.shape


def test_the_first_argument_is_the_data(place: Path) -> None:
    folder = place / "images"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)).save(
                folder / name / f"{i}.png"
            )
    run = torchmae.pretrain(folder, recipe="digits", model=TINY_VIT, **SMALL)
    assert run.path.parent == Path("runs")
    assert run.path.name.startswith("digits-")
    assert run.figures["knn"] is not None
    assert torchmae.load(run.path).description.classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("shape", "model"),
    [
        ((30, 16), {"input_size": [16], "patch_size": [4]}),
        ((30, 16, 2), {"input_size": [16], "patch_size": [4]}),
        ((30, 8, 12), {"input_size": [8, 12], "patch_size": [2, 4]}),
        ((12, 4, 8, 8, 1), {"input_size": [4, 8, 8], "patch_size": 4}),
    ],
)
def test_any_number_of_axes(place: Path, shape: tuple[int, ...], model: dict[str, Any]) -> None:
    file = array_file(place / "images.npy", *shape)
    run = torchmae.pretrain(file, recipe="digits", model={**TINY_VIT, **model}, out="a", **SMALL)
    size = torchmae.load("a").description.input_size
    assert list(size) == model["input_size"]
    assert run.figures["knn"] is None  # no labels
    assert run.figures["explained_variance_interpolation"] is not None


def test_a_configuration_at_once(place: Path) -> None:
    config = make(PretrainConfig, collect({**SMALL, "model": TINY_VIT, "out": "a"}, settings_of(PretrainConfig)))
    run = torchmae.pretrain(config=config)
    assert read_config(Path("a/config.yaml")) == config
    with pytest.raises(ConfigError, match=r"^config is given beside other settings; give either"):
        torchmae.pretrain("digits", config=config)
    again = torchmae.pretrain(resume=run.path, log_every=5)
    assert again.figures == run.figures
    with pytest.raises(ConfigError, match=r"^epochs cannot change in a resumed run; drop --epochs, .* --init-from a "):
        torchmae.pretrain(resume="a", epochs=7)


def test_without_held_out_images(place: Path) -> None:
    file = array_file(place / "images.npy", 20, 8, 8)
    run = torchmae.pretrain({"source": file, "val": "none"}, recipe="digits", model=TINY_VIT, out="a", **SMALL)
    assert (run.figures["num_val"], run.figures["loss"], run.figures["knn"]) == (0, None, None)
    assert records(run, "val") == []
    assert "20 images" in final_table(run.figures)
    assert "Loss" not in final_table(run.figures)


def test_unknown_settings(place: Path) -> None:
    with pytest.raises(ConfigError, match="unknown option 'epoch'; did you mean --epochs"):
        torchmae.pretrain(epoch=3)
    with pytest.raises(ConfigError, match=r"unknown option 'mask\.rato'; did you mean --mask\.ratio"):
        torchmae.pretrain(mask={"rato": 3})


def test_precision_on_resume(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "has_fast_bf16", lambda device: True)
    file = array_file(place / "images.npy", 20, 8, 8)
    torchmae.pretrain(file, recipe="digits", model=TINY_VIT, out="a", precision="auto", **SMALL)

    def resumed(**options: Any) -> str:
        torchmae.pretrain(resume="a", **options)
        return str(json.loads(Path("a/environment.json").read_text())["precision"])

    monkeypatch.setattr(runtime, "has_fast_bf16", lambda device: False)
    assert resumed() == "bf16"  # what "auto" meant when it began
    assert resumed(precision="fp32") == "fp32"
    assert yaml.safe_load(Path("a/config.yaml").read_text())["precision"] == "fp32"


def test_the_environment_keeps_the_first_start(place: Path) -> None:
    file = array_file(place / "images.npy", 20, 8, 8)
    torchmae.pretrain(file, recipe="digits", model=TINY_VIT, out="a", **SMALL)
    first = json.loads(Path("a/environment.json").read_text())
    Path("a/environment.json").write_text(json.dumps({**first, "started": "2026-01-01T00:00:00+00:00"}))
    torchmae.pretrain(resume="a")
    assert json.loads(Path("a/environment.json").read_text())["started"] == "2026-01-01T00:00:00+00:00"


def test_minutes(place: Path) -> None:
    run = torchmae.pretrain("digits", model=TINY_VIT, out="a", max_minutes=0.005, **{**SMALL, "batch_size": 64})
    checkpoint = load_checkpoint(Path("a/checkpoints"))
    assert checkpoint is not None
    assert checkpoint.state["step"] == checkpoint.state["total_steps"] == run.figures["steps"] >= 1
    learning_rates = [line["lr"] for line in records(run, "train")]
    assert learning_rates[-1] <= learning_rates[0]


def test_runs_are_the_same_whatever_is_measured(place: Path) -> None:
    file = array_file(place / "images.npz", 40, 8, 8, labels=True)
    options = {**SMALL, "recipe": "digits", "model": TINY_VIT, "data": {"source": file}}
    torchmae.pretrain(out="a", **options)
    torchmae.pretrain(out="b", **{**options, "eval": {"count": 3, "knn_count": 0, "images": 4}, "log_every": 1})
    torchmae.pretrain(out="c", **options, seed=1)
    a, b, c = (Path(name, "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_what_may_change_are_settings() -> None:
    assert set(values_of(PretrainConfig())) >= MAY_CHANGE


def test_build() -> None:
    model = torchmae.build("vit_tiny_32_p4", depth=1, in_chans=5, input_size=(16, 24))
    assert model.encode(torch.zeros(2, 5, 16, 24)).shape == (2, 192)
    with pytest.raises(ConfigError, match=r"model\.preset is 'vit_bas'; did you mean 'vit_base'\?"):
        torchmae.build("vit_bas")


def test_the_final_table() -> None:
    figures = {
        "steps": 2400, "images_seen": 287_400, "seconds": 88.4, "images_per_s": 3251.2, "num_val": 360,
        "target": "pixels", "loss": 0.34567, "loss_interpolation": 1.2, "loss_mean_patch": 1.3,
        "explained_variance": 0.623, "explained_variance_interpolation": -0.195,
        "knn": 94.72, "knn_untrained": 46.4, "knn_pixels": 98.3,
        "linear": 95.0, "linear_untrained": 80.0, "linear_pixels": 96.1,
    }  # fmt: skip
    lines = [" ".join(line.split()) for line in final_table(figures).splitlines()]
    assert "2,400 steps, 287,400 images in 88 s of training (3,251 images/s)" in lines
    assert "Loss on masked pixels 0.3457 1.2000 1.3000" in lines
    assert "Explained variance 0.623 -0.195" in lines
    assert "kNN accuracy, % 94.7 46.4 98.3" in lines
    assert "Linear probe accuracy, % 95.0 80.0 96.1" in lines
    assert max(map(len, final_table(figures).splitlines())) <= 100


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"preset": "vit_tiny"}, ((48, 200), (8, 8))),
        ({"depth": 3}, ((48, 200), (8, 8))),
        ({"preset": "vit_tiny", "patch_size": 16}, ((48, 192), (16, 16))),
        ({"patch_size": [16, 32]}, ((48, 192), (16, 32))),
        ({"preset": "vit_tiny", "input_size": [64, 128]}, ((64, 128), (8, 8))),
        ({"preset": "mlp"}, ((64, 64), None)),
    ],
)
def test_the_data_proposes_the_sizes_that_are_not_said(place: Path, options: Any, expected: Any) -> None:
    file = array_file(place / "x.npy", 8, 48, 200, 3)
    config = configure({"data.source": file, **collect({"model": options}, settings_of(PretrainConfig))})
    arguments = presets.arguments(config.model.preset, **overrides(config))
    assert (arguments["input_size"], arguments.get("patch_size")) == expected


def test_a_run_that_fails_before_its_first_step_may_be_tried_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    settings = {"recipe": "digits", "model": TINY_VIT, "out": "~/a", **SMALL}
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setattr(trainer, "train_step", fail)
    with pytest.raises(TrainingError, match="out of memory"):
        torchmae.pretrain(array_file(place / "x.npy", 20, 8, 8, 1), **settings)
    assert not (place / "~").exists()
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    run = torchmae.pretrain("x.npy", **{**settings, "batch_size": 4})
    assert run.path == place / "a"
    assert run.figures["state"] == "finished"
    with pytest.raises(ConfigError, match="holds a run already"):
        torchmae.pretrain("x.npy", **settings)


def test_runs_that_start_in_the_same_second_have_a_folder_each(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    file = array_file(place / "x.npy", 20, 8, 8, 1)
    runs = [torchmae.pretrain(file, recipe="digits", model=TINY_VIT, **SMALL) for _ in range(2)]
    assert [run.path.name for run in runs] == ["digits-20260101-000000", "digits-20260101-000000-2"]
