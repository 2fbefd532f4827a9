"""What is measured and drawn takes a bounded share of a run's time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torchmae
from torchmae import evaluators, visualize
from torchmae.config import DataConfig, EvalConfig
from torchmae.data.opening import Data, open_data
from torchmae.evaluators import FEWEST, LEAST_S, SHARE, within_budget
from torchmae.settings import read_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    file = folder / "images.npz"
    np.savez(file, images=np.zeros((10_000, 2, 2), np.uint8), labels=np.arange(10_000) % 5)
    return open_data(DataConfig(source=str(file)), input_size=(2, 2), channels=1, device=torch.device("cpu"))


def images_of(settings: EvalConfig, data: Data) -> int:
    assert data.val is not None
    probed = min(settings.knn_train, len(data.train)) + min(settings.knn_val, len(data.val))
    return probed * (settings.knn_count + 1) + min(settings.images, len(data.val)) * settings.count


@pytest.mark.parametrize(("image_s", "run_s"), [(1e-3, 1e3), (2e-3, 1e3), (0.01, 10.0), (0.01, 2e4), (0.1, 1e4)])
def test_a_tenth_of_the_run_and_a_minute_at_least(data: Data, image_s: float, run_s: float) -> None:
    asked, budget = EvalConfig(), max(LEAST_S, SHARE * run_s)
    chosen = within_budget(asked, data, image_s, run_s)
    if images_of(asked, data) * image_s <= budget:
        assert chosen == asked
        return
    assert images_of(chosen, data) * image_s <= budget * 1.01 or chosen.images == FEWEST
    assert images_of(chosen, data) * image_s > budget / 3  # and not far fewer than there is time for
    assert (chosen.count, chosen.knn_count, chosen.pictures) == (asked.count, asked.knn_count, asked.pictures)
    assert FEWEST <= chosen.images < asked.images
    assert chosen.linear_train < asked.linear_train


@pytest.mark.usefixtures("pictures_of_features")
def test_a_slow_run_says_and_keeps_what_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (evaluators, visualize):
        monkeypatch.setattr(module, "encoding_time", lambda *_: 0.05)
    options: dict[str, Any] = {"epochs": 1, "eval": {"count": 2, "knn_count": 1, "knn_train": 1200}}
    model = {"depth": 1, "embed_dim": 16, "num_heads": 2, "decoder_depth": 1, "decoder_embed_dim": 16}
    run = torchmae.pretrain("digits", recipe="digits", out=tmp_path / "run", model=model, **options)
    said = capsys.readouterr().err
    kept = read_config(run.path / "config.yaml").eval
    assert FEWEST <= kept.knn_train < 1200
    assert f"eval.knn_train {kept.knn_train}" in said
    assert "drawing pictures" in said
    torchmae.pretrain(resume=run.path)  # with the same images
    assert read_config(run.path / "config.yaml").eval == kept
