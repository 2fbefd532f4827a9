from __future__ import annotations

import math
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
import tiny

from torchmae import presets
from torchmae.config.evaluate import EvaluateOptions, ReconstructionOptions
from torchmae.data.layouts import open_splits
from torchmae.errors import ConfigError
from torchmae.evaluation import quality
from torchmae.evaluation.subject import Subject, untrained


@pytest.fixture
def metrics() -> object:
    return pytest.importorskip("skimage.metrics", reason="pip install 'torchmae[eval]'")


def run(subject: Subject | None = None, seed: int = 0, **options: Any) -> dict[str, float]:
    images = tiny.digits("val", 12)
    given = EvaluateOptions(reconstruction=ReconstructionOptions(**options), seed=seed)
    return quality.measure(tiny.bench(images, images), subject or tiny.subject(norm_pix=False), given).figures


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
def test_forward_passes_take_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, taken = tiny.subject(), []
    assert subject.model is not None
    original = subject.model.reconstruct
    monkeypatch.setattr(subject.model, "reconstruct", lambda *given: taken.append(len(given[0])) or original(*given))
    images = tiny.image_set(tiny.some(open_splits("digits")["val"], 12), batch_size=5)
    options = EvaluateOptions(reconstruction=ReconstructionOptions(ratios=(0.5,), strategies=("random",)))
    quality.measure(tiny.bench(images, images), subject, options)
    assert taken == [5, 5, 2]


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
    arguments = presets.arguments("mlp", input_size=8, in_chans=1, hidden_dim=4)
    mlp = untrained(partial(presets.construct, arguments), 0, tiny.CPU)
    assert "elements_0.5_psnr" in run(mlp, ratios=(0.5,))
    with pytest.raises(ConfigError, match="strategies is 'grid'"):
        run(mlp, strategies=("grid",))


def test_without_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(ConfigError, match=r"skimage is not installed, .*; pip install 'torchmae\[eval\]'"):
        run()
