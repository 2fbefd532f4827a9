from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from torchmae import presets
from torchmae.config.evaluate import ReconstructionOptions
from torchmae.data.loader import Batch
from torchmae.data.transforms import Normalisation
from torchmae.errors import ConfigError
from torchmae.evaluation import quality
from torchmae.evaluation.sharing import share
from torchmae.evaluation.subject import untrained
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.training.ranks import ALONE


@pytest.fixture
def metrics() -> object:
    return pytest.importorskip("skimage.metrics", reason="pip install 'torchmae[eval]'")


PLAIN = Normalisation((0.0,), (1.0,))


def measure(
    model: MaskedAutoencoder, images: torch.Tensor, normalisation: Normalisation = PLAIN, seed: int = 0, **options: Any
) -> dict[str, float]:
    count = len(images)
    batches = [Batch(images, torch.zeros(count), np.arange(count), 0)]
    return quality.measure_model(
        model,
        batches,
        share(np.arange(count), 250, ALONE),
        normalisation=normalisation,
        runtime=tiny.RUNTIME,
        options=ReconstructionOptions(**options),
        seed=seed,
    ).figures


def run(**options: Any) -> dict[str, float]:
    model = tiny.subject(norm_pix=False).model
    assert model is not None
    images = next(iter(tiny.digits("val", 12).batches())).images
    return measure(model, images, tiny.NORMALISATION, **options)


@pytest.mark.usefixtures("metrics")
def test_a_figure_for_every_strategy_and_ratio() -> None:
    figures = run(ratios=(0.5, 0.75))
    names = [
        f"{strategy}_{ratio}_{metric}{suffix}"
        for strategy in ("random", "block", "grid")
        for ratio in ("0.5", "0.75")
        for metric in ("psnr", "ssim", "explained_variance")
        for suffix in ("", "_interpolation")
    ]
    assert sorted(figures) == sorted(names)
    assert all(math.isfinite(value) for value in figures.values())
    # The more is hidden, the worse the picture as a whole.
    assert figures["grid_0.5_psnr_interpolation"] > figures["grid_0.75_psnr_interpolation"]
    assert run(ratios=(0.5, 0.75)) == figures
    assert run(ratios=(0.5, 0.75), seed=1) != figures


@pytest.mark.usefixtures("metrics")
def test_the_psnr_is_that_of_the_mean_squared_error() -> None:
    true = np.full((1, 9, 9), 0.5, dtype=np.float32)
    import skimage.metrics as library

    values = quality._compare(library, true, true + np.float32(0.1))
    assert values["psnr"] == pytest.approx(20.0, abs=1e-4)
    assert quality._compare(library, true, true) == {"psnr": quality._PSNR_LIMIT, "ssim": pytest.approx(1.0)}


@pytest.mark.usefixtures("metrics")
@pytest.mark.parametrize(("size", "has_ssim"), [((6, 9), True), ((3, 3), True), ((2, 5), False), ((40,), True)])
def test_ssim_fits_small_images(size: tuple[int, ...], has_ssim: bool) -> None:
    import skimage.metrics as library

    true = np.random.default_rng(0).random((2, *size), dtype=np.float32)
    assert ("ssim" in quality._compare(library, true, 1 - true)) is has_ssim


@pytest.mark.usefixtures("metrics")
def test_the_mlp_model_hides_elements() -> None:
    model = untrained(presets.arguments("mlp", input_size=8, in_chans=1, hidden_dim=4), 0, tiny.CPU).model
    assert model is not None
    images = torch.randn(5, 1, 8, 8)
    figures = measure(model, images, ratios=(0.5,))
    assert "elements_0.5_psnr" in figures
    with pytest.raises(ConfigError, match="strategies is 'grid'"):
        measure(model, images, strategies=("grid",))


def test_without_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(ConfigError, match=r"PSNR and SSIM need scikit-image; pip install 'torchmae\[eval\]'"):
        run()
