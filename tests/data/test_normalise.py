"""data.normalise: what each way makes of values, and that a saved model does the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import torchmae
from torchmae.config import DataConfig, PretrainConfig
from torchmae.config.pretrain import ModelConfig
from torchmae.data.arrays import ArraySource
from torchmae.data.items import Context
from torchmae.data.opening import Data, open_data
from torchmae.errors import ConfigError
from torchmae.training.runtime import Runtime
from torchmae.visualize import open_run_data

RUNTIME = Runtime(torch.device("cpu"), "fp32", 1)

RNG = np.random.default_rng(0)
SIGNALS = (RNG.normal(3, 2, (20, 64, 2)) * np.linspace(1, 9, 20)[:, None, None]).astype(np.float32)
SPIKED = SIGNALS.copy()
SPIKED[::6, 5, 0] = 1e6  # 4 of 1,280


def opened(values: np.ndarray, **settings) -> Data:
    config = DataConfig(source="own", val="none", flip=False, crop_scale=(1, 1), **settings)
    own = {"train": ArraySource(values, context=Context(spatial_dims=values.ndim - 2))}
    return open_data(config, input_size=values.shape[1:-1], channels=None, device=torch.device("cpu"), own=own)


def batch(data: Data) -> np.ndarray:
    return next(data.train.eval_batches(np.arange(len(data.train)), 64)).images.movedim(1, -1).numpy()


def test_over_the_data_set_outliers_are_clipped() -> None:
    plain, spiked = (opened(values).normalisation for values in (SIGNALS, SPIKED))
    np.testing.assert_allclose(plain.mean, SIGNALS.mean((0, 1)), rtol=1e-5)  # of all pixels
    np.testing.assert_allclose(plain.std, SIGNALS.std((0, 1)), rtol=1e-5)
    assert spiked.std[0] < 3 * plain.std[0]  # of SPIKED itself it is 4,000 times as large
    np.testing.assert_allclose(spiked.std[1], plain.std[1], rtol=1e-5)
    low, high = plain.limits
    np.testing.assert_allclose(np.subtract(high, low), 3 * np.subtract(plain.high, plain.low))
    assert np.abs(batch(opened(SPIKED))).max() < 30
    flat = (SPIKED - spiked.mean) / spiked.std
    np.testing.assert_allclose(batch(opened(SPIKED))[..., 1], flat[..., 1], atol=1e-4)


def test_the_range_that_is_shown_of_samples_is_that_of_the_input() -> None:
    plain = opened(SIGNALS, normalise="sample").normalisation
    scaled = opened(SIGNALS, normalise="sample", scale={"float32": 1000}).normalisation
    assert plain.low is not None and plain.high is not None and scaled.low is not None and scaled.high is not None
    np.testing.assert_allclose([plain.low, plain.high], [scaled.low, scaled.high], rtol=1e-4)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pictures_are_never_clipped(dtype: type) -> None:
    pictures = RNG.integers(0, np.iinfo(dtype).max, (9, 8, 8, 3)).astype(dtype)
    found = opened(pictures).normalisation
    assert found.limits is None
    one = np.iinfo(dtype).max
    np.testing.assert_allclose(found.mean, (pictures / one).mean((0, 1, 2)), rtol=1e-6)


def test_each_sample_by_its_own_pixels_with_data() -> None:
    values = batch(opened(SIGNALS, normalise="sample"))
    np.testing.assert_allclose(values.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(values.std(1), 1, atol=1e-4)
    gaps = SIGNALS.copy()
    gaps[:, 40:] = np.nan
    np.testing.assert_allclose(batch(opened(gaps, normalise="sample"))[:, 40:], 0)
    np.testing.assert_allclose(batch(opened(gaps, normalise="sample"))[:, :40].std(1), 1, atol=1e-4)
    assert (batch(opened(np.ones_like(SIGNALS), normalise="sample")) == 0).all()


def test_none_takes_values_as_they_are() -> None:
    np.testing.assert_array_equal(batch(opened(SPIKED, normalise="none")), SPIKED)


@pytest.mark.parametrize("way", ["dataset", "sample", "none"])
def test_a_saved_model_does_the_same(tmp_path: Path, way: str) -> None:
    np.save(tmp_path / "x.npy", SPIKED)
    run = torchmae.pretrain(
        {"source": tmp_path / "x.npy", "axes": "LC", "normalise": way, "val": "none"},
        recipe="digits",
        model={"input_size": (64,), "patch_size": (8,)},
        epochs=1,
        out=tmp_path / "run",
        progress="none",
    )
    model = torchmae.load(run.path)
    assert json.loads((run.path / "model.json").read_text())["normalise"] == way
    expected = batch(opened(SPIKED, normalise=way))
    np.testing.assert_allclose(model.preprocess(*SPIKED).movedim(1, -1), expected, rtol=1e-4, atol=1e-5)
    shown = model.description.normalisation.shown(model.preprocess(*SIGNALS))
    assert -0.6 < float(shown.quantile(0.02)) < float(shown.quantile(0.98)) < 1.6
    drawn = open_run_data(run.path, model, RUNTIME, None, None)  # for `visualize` and the page
    np.testing.assert_allclose(batch(drawn), expected, rtol=1e-4, atol=1e-5)


def test_settings_that_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="leave one"):
        DataConfig(normalise="sample", mean=(0.0,), std=(1.0,))
    with pytest.raises(ConfigError, match="dataset"):
        PretrainConfig(data=DataConfig(normalise="sample"), model=ModelConfig(teacher="x"))
