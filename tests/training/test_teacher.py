"""A frozen network as a training target, by settings."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import torchmae
from torchmae.cli import main
from torchmae.data.transforms import Normalisation
from torchmae.errors import ConfigError
from torchmae.training.teacher import Teacher, read_teacher

SMALL: dict[str, Any] = {
    "model": {"depth": 1, "embed_dim": 16, "num_heads": 2, "decoder_depth": 1, "decoder_embed_dim": 16},
    "batch_size": 96, "threads": 1, "progress": "none", "epochs": 1, "eval": {"count": 1, "images": 40, "knn_count": 0},
}  # fmt: skip


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and one that learned from it."""
    folder = tmp_path_factory.mktemp("taught")
    first = torchmae.pretrain("digits", out=folder / "teacher", **SMALL)
    options = {**SMALL, "epochs": 2, "model": {**SMALL["model"], "teacher": str(first.path), "teacher_weight": 0.5}}
    return first.path, torchmae.pretrain("digits", out=folder / "run", **options).path


def test_its_loss_is_logged_and_its_weights_are_no_part_of_the_model(taught: tuple[Path, Path]) -> None:
    lines = [json.loads(line) for line in (taught[1] / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss_teacher"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0]
    names = torchmae.load(taught[1]).model.state_dict()
    assert {name.partition(".")[0] for name in names} == {"encoder", "decoder", "teacher_head"}


def test_the_run_is_loaded_and_resumed_and_asks_for_its_teacher_only_to_train(
    taught: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(taught[1], run)
    before = (run / "model.safetensors").read_bytes()
    torchmae.pretrain(resume=run)
    assert (run / "model.safetensors").read_bytes() == before
    moved = taught[0].rename(tmp_path / "moved")
    try:
        assert torchmae.load(run).encode(torch.zeros(1, 1, 8, 8)).shape == (1, 16)
        assert torchmae.evaluate(run, method="knn", train_images=50, test_images=20)["knn10"] > 0
        assert main(["pretrain", "--resume", str(run)]) == 2
        assert str(taught[0]) in capsys.readouterr().err
    finally:
        moved.rename(taught[0])


def test_features_are_those_of_the_teachers_own_preprocessing(taught: tuple[Path, Path]) -> None:
    loaded = torchmae.load(taught[0])
    about = loaded.description
    pixels = torch.rand(3, 1, 8, 8)
    wanted = loaded.encode((pixels - about.mean[0]) / about.std[0], "tokens")
    student = Normalisation((0.2,), (0.7,))
    teacher = read_teacher(str(taught[0]), (4, 4)).teach((2, 2), student)
    torch.testing.assert_close(teacher((pixels - 0.2) / 0.7), wanted)
    larger = F.interpolate(pixels, (16, 16), mode="nearest")  # patches of four pixels a side
    teacher = read_teacher(str(taught[0]), (4, 4)).teach((4, 4), student)
    assert teacher((larger - 0.2) / 0.7).shape == (3, 16, 16)
    with pytest.raises(ConfigError, match="channels"):
        teacher.teach((2, 2), Normalisation((0.1, 0.2, 0.3), (1.0, 1.0, 1.0)))


def test_a_teacher_sees_values_in_their_unit_or_as_they_are_shown(taught: tuple[Path, Path]) -> None:
    teacher, close = read_teacher(str(taught[0]), (4, 4)), {"rtol": 1e-4, "atol": 1e-4}
    student = Normalisation((-500.0,), (300.0,), (-1000.0,), (400.0,), {"float32": 1.0}, "dataset")  # Hounsfield units
    values = torch.rand(2, 1, 8, 8) * 1400 - 1000
    wanted = teacher.tokens(teacher.normalisation.apply((values + 1000) / 1400))
    torch.testing.assert_close(teacher.teach((2, 2), student)(student.apply(values)), wanted, **close)
    teacher.normalisation = replace(student, mean=(-400.0,), low=(-900.0,), high=(300.0,))  # trained on such data too
    values = values.clamp(-900, 300)
    wanted = teacher.tokens(teacher.normalisation.apply(values))
    torch.testing.assert_close(teacher.teach((2, 2), student)(student.apply(values)), wanted, **close)
    teacher.normalisation = Normalisation((0.5,), (0.25,), None, None, {"float32": 1.0}, "dataset")  # shares of 1
    wanted = teacher.tokens(teacher.normalisation.apply((values + 1000) / 1400))
    torch.testing.assert_close(teacher.teach((2, 2), student)(student.apply(values)), wanted, **close)
    teacher.normalisation = replace(student, normalise="sample")
    with pytest.raises(ConfigError, match="the teacher was trained with data.normalise 'sample'"):
        teacher.teach((2, 2), student)


def test_models_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **others: create(name, **others))
    torch.manual_seed(0)
    teacher = read_teacher("timm:vit_tiny_patch16_224", (4, 4)).teach((2, 2), Normalisation((0.3,), (0.4,)))
    assert isinstance(teacher, Teacher)
    assert teacher(torch.randn(2, 1, 8, 8)).shape == (2, 16, 192)  # grey, repeated; 64 pixels a side
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    pixels = torch.rand(1, 3, 64, 64)
    student = teacher.teach((16, 16), Normalisation((0.1, 0.2, 0.3), (1.0, 1.0, 1.0)))
    given = pixels - torch.tensor((0.1, 0.2, 0.3)).view(1, 3, 1, 1)
    assert isinstance(teacher.network, nn.Module)
    wanted = teacher.network.eval().forward_features((pixels - mean) / std)[:, 1:]  # type: ignore[operator]
    torch.testing.assert_close(student.eval()(given), wanted)


@pytest.mark.parametrize("name", ["timm:no_such_model", "timm:resnet18", "runs/none"])
def test_what_cannot_teach(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--model.teacher", name, "--out", str(tmp_path / "run"), "--progress", "none"]) == 2
    assert name.removeprefix("timm:") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
