"""Objects of one's own from outside the package: trained, killed, resumed, evaluated, reported, embedded."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_parts import Averages
from torch import Tensor

import torchmae
from torchmae.cli import main
from torchmae.data.items import ArrayItem
from torchmae.data.sources import Source
from torchmae.errors import ConfigError, TorchmaeError
from torchmae.nn import Mask, MaskedAutoencoder, PixelTarget, SelfDecoder


class Squares(Source):
    """A bright square whose size is its label."""

    classes = ("small", "large")

    def __init__(self, count: int, seed: int = 0) -> None:
        noise = np.random.default_rng(seed).integers(0, 60, (count, 8, 8, 1), dtype=np.uint8)
        self.labels = np.arange(count) % 2
        noise[self.labels == 0, 3:5, 3:5] += 150
        noise[self.labels == 1, 1:7, 1:7] += 150
        self.images = noise

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int) -> ArrayItem:
        return ArrayItem(self.images[index])

    def name(self, index: int) -> str:
        return f"squares/{index}"

    def fingerprint(self) -> str:
        return f"squares {len(self)}"


def three_quarters(noise: Tensor, grid: tuple[int, ...], ratio: float) -> Mask:
    """Masks three quarters of the patches."""
    return Mask(*noise.argsort(1).split([4, 12], dim=1))


def parts() -> dict[str, Any]:
    torch.manual_seed(0)
    pixels = PixelTarget((2, 2), 1, norm_pix=False)
    decoder = SelfDecoder(12, (4, 4), embed_dim=8, depth=1, num_heads=2, out_dim=pixels.dim)
    model = MaskedAutoencoder(Averages(), decoder, [pixels])
    return {"model": model, "mask": {"strategy": three_quarters}, "source": Squares(200)}


SETTINGS: dict[str, Any] = {
    "epochs": 3, "batch_size": 16, "threads": 1, "checkpoint_minutes": 0.0005, "log_every": 5, "seed": 3,
    "optim": {"name": "adamw", "lr": 3e-3}, "progress": "none",
    "eval": {"count": 2, "images": 20, "knn_train": 100, "knn_val": 20, "linear_train": 0},
}  # fmt: skip


def train(out: Path) -> None:
    multiprocessing.set_start_method(None, force=True)
    torchmae.pretrain(**parts(), out=out, **SETTINGS)


def test_from_weights_to_features_and_through_a_kill(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    given = parts()
    before = {name: value.clone() for name, value in given["model"].state_dict().items()}
    run = torchmae.pretrain(**given, out=whole, **SETTINGS)
    assert all(torch.equal(before[name], value) for name, value in given["model"].state_dict().items())
    assert run.figures["loss"] < run.figures["loss_mean_patch"]

    process = multiprocessing.get_context("fork").Process(target=train, args=(killed,))
    process.start()
    while not list((killed / "checkpoints").glob("step-*")):
        process.join(0.002)
        assert process.exitcode is None, "the run ended before it was killed"
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not (killed / "model.safetensors").exists()
    torchmae.pretrain(resume=killed, **parts())
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    model, source = given["model"], given["source"]
    test = {"train": source, "test": Squares(60, seed=1)}
    figures = torchmae.evaluate(whole, method="knn", model=model, source=test)
    assert figures["knn10"] == 100
    written = torchmae.embed(whole, model=model, source=test, out=tmp_path / "features.npz")
    assert (written.count, written.shape) == (260, (12,))
    encoded = torchmae.load(whole, model=model).encode(torch.zeros(1, 1, 8, 8))
    assert encoded.shape == (1, 12)
    assert not torch.equal(encoded, model.encode(torch.zeros(1, 1, 8, 8)))
    assert main(["report", str(whole)]) == 0


def test_all_sets_the_untrained_model_beside_the_run(tmp_path: Path) -> None:
    given = parts()
    torchmae.pretrain(**given, out=tmp_path / "run", **{**SETTINGS, "epochs": 1})
    few = {"epochs": 1}
    figures = torchmae.evaluate(tmp_path / "run", model=given["model"], source=Squares(100), attentive=few)
    assert {"knn20", "random.knn20", "pixels.knn20"} <= figures.keys()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("own") / "run"
    torchmae.pretrain(**parts(), out=out, **{**SETTINGS, "epochs": 1})
    return out


@pytest.mark.parametrize("left_out", ["model", "mask", "source"])
def test_what_is_not_handed_over_again_is_asked_for(run: Path, left_out: str) -> None:
    given = {name: value for name, value in parts().items() if name != left_out}
    with pytest.raises(ConfigError, match="hand it over") as caught:
        torchmae.pretrain(resume=run, **given)
    assert f"{left_out}=" in caught.value.fix


def test_a_run_folder_causes_no_code_to_be_imported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = set(sys.modules)
    for words in (["evaluate", str(run), "--method", "knn"], ["embed", str(run)], ["pretrain", "--resume", str(run)]):
        assert main(words) == 2
        assert "hand it over" in capsys.readouterr().err
    assert {name for name in set(sys.modules) - known if "test_own" in name} == set()


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ({"source": [1, 2]}, "Source"),
        ({"source": {"val": Squares(10)}}, "'train'"),
        ({"model": {"preset": "own"}}, "model="),
        ({"data": "own"}, "source="),
        ({"init_from": "runs/a", "model": parts()["model"]}, "load the weights into the model"),
    ],
)
def test_objects_that_do_not_fit(given: dict[str, Any], fix: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        torchmae.pretrain(**given, out=tmp_path / "run", progress="none")
    assert fix in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_an_object_that_fails_does_so_before_there_is_a_folder(tmp_path: Path) -> None:
    def broken(noise: Tensor, grid: tuple[int, ...], ratio: float) -> Mask:
        raise ZeroDivisionError

    def of_another_grid(noise: Tensor, grid: tuple[int, ...], ratio: float) -> Mask:
        return Mask(*noise.argsort(1)[:, :8].split([4, 4], dim=1))

    given = parts()
    for strategy, error in ((broken, ZeroDivisionError), (of_another_grid, TorchmaeError)):
        with pytest.raises(error):
            torchmae.pretrain(**{**given, "mask": {"strategy": strategy}}, out=tmp_path / "run", **SETTINGS)
        assert not (tmp_path / "run").exists()
