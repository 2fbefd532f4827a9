from __future__ import annotations

import json
import re
import shlex
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from torchmae import presets
from torchmae.api import configure, recommend
from torchmae.building import check_model, overrides
from torchmae.cli import main
from torchmae.config import DataConfig, MaskConfig, ModelConfig, OptimConfig, PretrainConfig
from torchmae.data.loader import Plan
from torchmae.data.opening import open_data
from torchmae.errors import ConfigError
from torchmae.nn.masking import Masker
from torchmae.settings import parse, read_words, recipe_names, recipe_path, recipe_summary
from torchmae.training.checkpoint import load_checkpoint
from torchmae.tutorial import compose


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses_and_makes_its_model(name: str) -> None:
    config = parse([], name)
    assert config.recipe == name
    check_model(config, presets.weightless(presets.arguments(config.model.preset, **overrides(config))))


@pytest.mark.parametrize("name", recipe_names())
def test_the_head_of_every_recipe_says_what_it_is_and_how_to_run_it(name: str) -> None:
    head = [line for line in recipe_path(name).read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert len(recipe_summary(name)) > 30
    assert head[0] == f"# {recipe_summary(name)}"
    assert head[0].endswith("."), "`torchmae recipes` shows the first line alone: it is a whole sentence"
    assert head[1] == "#"
    commands = [line.removeprefix("# command:").strip() for line in head if line.startswith("# command:")]
    assert len(commands) == 1
    command = commands[0].split()
    assert command[:2] == ["torchmae", "pretrain"]
    if name == "digits":
        assert command[2:] == []
        return
    assert command[command.index("--recipe") + 1] == name
    parse(command[2:], name)


@pytest.mark.parametrize(
    ("shape", "recipe", "input_size", "patch_size"),
    [
        ((8, 8, 1), "digits", (8, 8), (2, 2)),
        ((16, 16, 1), "digits", (16, 16), (2, 2)),
        ((13, 10, 3), "digits", (12, 10), (2, 2)),
        ((28, 28, 1), "cifar10-cpu", (32, 32), (4, 4)),
        ((32, 28, 3), "cifar10-cpu", (32, 32), (4, 4)),
        ((64, 64, 12), "photos-64-cpu", (64, 64), (8, 8)),
        ((96, 96, 3), "photos-64-cpu", (64, 64), (8, 8)),
        ((224, 224, 3), "photos-64-cpu", (64, 64), (8, 8)),
        ((300, 500, 3), "photos-64-cpu", (64, 64), (8, 8)),
        ((150, 900, 3), "photos-64-cpu", (64, 448), (16, 16)),
        ((400, 1), "signals", (400,), (2,)),
        ((2000, 1), "signals", (1800,), (20,)),
        ((12, 12, 12, 1), "volumes", (12, 12, 12), (2, 2, 2)),
        ((16, 64, 65, 1), "volumes", (16, 64, 64), (4, 8, 8)),
    ],
)
def test_recipe_and_shape_are_chosen_by_the_images_as_inspect_says(
    tmp_path: Path,
    shape: tuple[int, ...],
    recipe: str,
    input_size: tuple[int, ...],
    patch_size: tuple[int, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "images.npy"
    images = np.random.default_rng(0).integers(0, 255, (3, *shape), dtype=np.uint8)
    np.save(path, images[..., 0] if len(shape) == 2 else images)
    config = configure(read_words(["--data", str(path), "--progress", "none"], PretrainConfig))
    arguments = presets.arguments(config.model.preset, **overrides(config))
    assert (config.recipe, arguments["input_size"], arguments["patch_size"]) == (recipe, input_size, patch_size)
    check_model(config, presets.weightless(arguments))
    assert main(["data", "inspect", str(path), "--json", "--progress", "none"]) == 0
    command = shlex.split(json.loads(capsys.readouterr().out)["suggestion"])
    assert command[:2] == ["torchmae", "pretrain"]
    assert configure(read_words([*command[2:], "--progress", "none"], PretrainConfig)) == config


@pytest.mark.parametrize(
    ("size", "meta", "recipe"),
    [
        ((30, 240, 320), {"fps": 30}, "video"),
        ((4000,), {"rate": 8000}, "sound"),
        ((64, 100), {"rate": 8000}, "sound"),  # a spectrogram
        ((1800,), {"rate": 360}, "signals"),
        ((512, 512), {"crs": "EPSG:4326"}, "satellite"),
    ],
)
def test_what_files_say_chooses_a_recipe_with_its_own_shape(
    size: tuple[int, ...], meta: dict[str, Any], recipe: str
) -> None:
    assert recommend(size, meta) == (recipe, {})


@pytest.mark.parametrize(("side", "recipe"), [(16, "digits"), (48, "cifar10"), (128, "images-96"), (500, "images")])
def test_a_gpu_takes_larger_networks_and_pictures(side: int, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchmae.api.find_device", lambda name: torch.device(name))
    assert recommend((side, side), {}, "cuda")[0] == recipe


@pytest.mark.parametrize(("bands", "patch", "height"), [(40, 8, 40), (80, 8, 80), (128, 16, 128), (130, 16, 128)])
def test_the_input_has_as_many_bands_as_the_spectrograms(bands: int, patch: int, height: int) -> None:
    shape = {"input_size": (height, 64), "patch_size": patch}
    assert recommend((bands, 300), {"rate": 16000}) == ("sound", shape)


def test_a_preset_replaces_the_encoder_of_the_recipe_that_is_chosen_but_not_its_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "signals.npy"
    np.save(path, np.zeros((3, 1800), dtype=np.float32))
    monkeypatch.setenv("CXX", "")
    monkeypatch.setattr("torchmae.training.compilation.COMPILERS", ())
    given = ["--data", str(path), "--progress", "none", "--model.preset", "vit_small"]
    config = configure(read_words(given, PretrainConfig))
    arguments = presets.arguments(config.model.preset, **overrides(config))
    assert (config.recipe, arguments["input_size"], arguments["patch_size"]) == ("signals", (1800,), (20,))
    assert arguments["embed_dim"] == presets.PRESETS["vit_small"]["embed_dim"]
    assert not config.compile  # there is no compiler


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (["--recipe", "video"], (8, 64, 64)),
        (["--recipe", "video", "--data.clip", "[16, 4]"], (16, 64, 64)),
        (["--recipe", "video", "--data.clip", "[16, 4]", "--model.input_size", "[8, 32, 32]"], (8, 32, 32)),
        (["--recipe", "signals", "--data.clip", "400"], (400,)),
        (["--recipe", "signals", "--data.clip", "250"], (240,)),  # in whole patches of 20
    ],
)
def test_the_input_is_as_long_as_the_clips(words: list[str], size: tuple[int, ...]) -> None:
    config = configure(read_words(words, PretrainConfig))
    assert presets.arguments(config.model.preset, **overrides(config))["input_size"] == size


def test_a_patch_size_that_is_given_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "images.npy"
    np.save(path, np.zeros((3, 16, 16, 1), dtype=np.uint8))
    given = ["--data", str(path), "--progress", "none", "--model.patch_size", "4"]
    config = configure(read_words(given, PretrainConfig))
    assert (config.recipe, config.model.input_size, config.model.patch_size) == ("digits", (16, 16), 4)


def test_progress_is_shown_while_the_data_is_opened_for_the_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as archive:
        Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
        archive.add(tmp_path / "a.png", "a.png")
    assert configure(read_words(["--data", str(path)], PretrainConfig)).recipe == "cifar10-cpu"
    assert "indexing shards: 1 of 1" in capsys.readouterr().err
    assert configure(read_words(["--data", str(path), "--progress", "none"], PretrainConfig)).recipe == "cifar10-cpu"
    assert capsys.readouterr().err == ""


def test_a_mistake_is_said_before_the_data_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown option 'epohcs'"):
        configure(read_words(["--data", str(tmp_path / "nothing here"), "--epohcs", "3"], PretrainConfig))


def test_the_tutorials_numbers() -> None:
    config = parse([], "tutorial")
    arguments = presets.arguments(config.model.preset, **overrides(config))
    assert arguments == {
        "input_size": (32, 32), "in_chans": 3, "hidden_dim": 128, "output_relu": True, "loss_on": "all"
    }  # fmt: skip
    assert config.optim == OptimConfig(
        name="adam", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, schedule="constant", warmup=0.0
    )
    assert config.mask == MaskConfig("elements_inverted", 0.75)
    assert (config.epochs, config.batch_size, config.accumulate) == (10, 128, 1)
    assert config.data == DataConfig(
        source="cifar10", val="test", crop_scale=(1.0, 1.0), flip=False, mean=(0.5,) * 3, std=(0.5,) * 3, num_workers=2
    )
    assert (config.precision, config.progress) == ("fp32", "epochs")
    model = presets.construct(arguments)
    assert [tuple(p.shape) for p in model.parameters()] == [(128, 3072), (128,), (3072, 128), (3072,)]
    noise = torch.rand(2, 3072)
    keep = ~Masker(model.encoder, "elements_inverted", 0.75).from_noise(noise).flags
    assert torch.equal(keep, noise < 0.75)  # X * M with M = 1 where rand < 0.75


def test_the_corrected_one_differs_in_the_three_defects_alone() -> None:
    literal, corrected = parse([], "tutorial"), parse([], "tutorial-corrected")
    assert corrected.model == ModelConfig(preset="mlp", hidden_dim=128, output_relu=False, loss_on="hidden")
    assert corrected.mask == MaskConfig("elements", 0.75)
    for name in ("data", "optim", "eval", "epochs", "batch_size", "precision", "progress", "accumulate"):
        assert getattr(corrected, name) == getattr(literal, name)


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """A folder as CIFAR-10 unpacks to, of two classes and few images."""
    chance = np.random.default_rng(0)
    for split, count in (("train", 80), ("test", 10)):
        for label, colour in (("cat", (200, 80, 60)), ("ship", (40, 90, 210))):
            folder = tmp_path / "cifar" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(chance.normal(colour, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return tmp_path / "cifar"


def test_the_tutorial_prints_its_ten_lines(cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["pretrain", "--recipe", "tutorial", "--data", str(cifar), "--out", str(out), "--threads=1"]) == 0
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("Epoch")]
    matches = [re.fullmatch(r"Epoch \[(\d+)/10\], Loss: (\d+\.\d{4})", line) for line in lines]
    assert all(matches)
    assert [int(match[1]) for match in matches if match] == list(range(1, 11))
    losses = [float(match[2]) for match in matches if match]
    assert losses[-1] < 0.8 * losses[0]
    assert printed.err == ""
    checkpoint = load_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.state["total_steps"] == 10 * 2  # 160 images in batches of 128


def test_the_tutorials_first_loss_is_the_formula(cifar: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--data", str(cifar), "--out", str(out), "--threads=1", "--epochs=1", "--log-every=1", "--seed=5"]
    assert main(["pretrain", "--recipe", "tutorial", *options, "--progress=none"]) == 0
    config = parse(["--config", str(out / "config.yaml")])

    data = open_data(config.data, input_size=(32, 32), channels=None, device=torch.device("cpu"))
    batch = next(data.train.train_batches(Plan(len(data.train), 128, 5), 0, 1))
    files = [data.train.source.name(int(index)) for index in batch.indices]
    x = np.stack([np.asarray(Image.open(file), dtype=np.float64) for file in files])
    x = ((x / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2).reshape(128, -1)  # ToTensor, Normalize(0.5, 0.5), flat
    torch.manual_seed(5)
    model = compose(input_size=(32, 32), in_chans=3, hidden_dim=128, output_relu=True, loss_on="all")
    we, be, wd, bd = (p.detach().double().numpy() for p in model.parameters())
    mask = ~Masker(model.encoder, **asdict(config.mask))(
        5, batch.epoch, batch.indices, torch.device("cpu")
    ).flags.numpy()
    assert mask.mean() == pytest.approx(0.75, abs=0.005)
    z = np.maximum((x * mask) @ we.T + be, 0)
    prediction = np.maximum(z @ wd.T + bd, 0)
    logged = (out / "metrics.jsonl").read_text().splitlines()
    first = next(line for line in logged if '"train"' in line)
    assert '"step": 1,' in first
    assert float(re.findall(r'"loss": ([\d.e-]+)', first)[0]) == pytest.approx(np.mean((x - prediction) ** 2), rel=1e-5)
