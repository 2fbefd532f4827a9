"""How well a model fills in what is hidden: PSNR and SSIM of whole pictures, explained variance of hidden pixels."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchmae.data.transforms import Normalisation
from torchmae.errors import ConfigError, one_of
from torchmae.evaluation.inpainting import interpolate
from torchmae.evaluation.reconstruction import HoldOut
from torchmae.evaluation.scores import Result
from torchmae.evaluation.sharing import Share
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.training.runtime import Runtime

BATCH = 250

_WINDOW = 7  # scikit-image's default side of SSIM's window
_PSNR_LIMIT = 100.0  # dB, an error of 1e-5: stands for infinity, which would spoil a mean


def strategies_of(model: MaskedAutoencoder) -> tuple[str, ...]:
    """The mask strategies of a model that are measured."""
    return tuple(name for name, strategy in model.encoder.strategies.items() if strategy.evaluated)


def run(
    model: MaskedAutoencoder,
    images: Tensor,
    *,
    normalisation: Normalisation,
    runtime: Runtime,
    ratios: Sequence[float] = (0.5, 0.75, 0.9),
    strategies: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Figures for every strategy and ratio, each beside the same of interpolation. Arguments as for `measure`."""
    return measure(
        model, images, normalisation=normalisation, runtime=runtime, ratios=ratios, strategies=strategies, seed=seed
    ).figures


def measure(
    model: MaskedAutoencoder,
    images: Tensor,
    *,
    normalisation: Normalisation,
    runtime: Runtime,
    ratios: Sequence[float] = (0.5, 0.75, 0.9),
    strategies: Sequence[str] | None = None,
    seed: int = 0,
    share: Share | None = None,
) -> Result:
    """PSNR and SSIM (scikit-image's) of whole pictures with the visible part pasted, and explained variance.

    Args:
        model: the model.
        images: (B, C, *size) float32, normalised, on the device.
        normalisation: how they became so; PSNR and SSIM are of the range that it shows.
        runtime: where to compute.
        ratios: shares that are hidden, each in (0, 1).
        strategies: how; None: all that the model has.
        seed: another one gives other masks.
        share: of several ranks, the share of the images that `images` are, in batches of `BATCH`; all ranks call this,
            and the figures are of all images. None: `images` are all there are.

    Returns:
        figures `<strategy>_<ratio>_psnr` (dB, mean over images), `_ssim`, `_explained_variance` (of the hidden values,
        in the target's space), and each of them once more with `_interpolation`.

    Raises:
        ConfigError: scikit-image is not installed, or a strategy that the model does not have.
    """
    metrics = _import_metrics()
    known = strategies_of(model)
    share = share or Share(np.arange(len(images)), len(images), -(-len(images) // BATCH))
    figures: dict[str, float] = {}
    notes: list[str] = []
    rows: list[dict[str, Any]] = []
    for strategy in strategies or known:
        one_of("reconstruction.strategies", strategy, known)
        for ratio in ratios:
            masker = Masker(model.encoder, strategy, ratio)
            batches = [
                (part, masker(seed, 0, share.rows[start : start + BATCH], runtime.device))
                for start, part in zip(range(0, len(images), BATCH), torch.split(images, BATCH), strict=True)
            ]
            values, note = _measure_one(model, batches, normalisation, runtime, metrics, share)
            figures |= {f"{strategy}_{ratio:g}_{name}": value for name, value in values.items()}
            rows.append({"strategy": strategy, "ratio": ratio, **values})
            notes.append(f"PSNR and SSIM: {note}")
    count = sum(share.ranks.gather(share.num_images))
    return Result(figures, {"images": count, "rows": rows}, tuple(dict.fromkeys(notes)))


@torch.no_grad()
def _measure_one(
    model: MaskedAutoencoder,
    batches: Sequence[tuple[Tensor, Any]],
    normalisation: Normalisation,
    runtime: Runtime,
    metrics: Any,
    share: Share,
) -> tuple[dict[str, float], str]:
    by_batch: list[dict[str, list[float]]] = []
    note = ""
    for images, mask in batches:
        with runtime.autocast():
            result = model.reconstruct(images, mask)
        note = result.note
        original = normalisation.shown(images).numpy()
        by_name: dict[str, list[float]] = {}
        guesses = {"": result.images, "_interpolation": interpolate(images, result.removed)}
        for suffix, guess in guesses.items():
            for true, filled in zip(original, normalisation.shown(guess).numpy(), strict=True):
                for name, value in _compare(metrics, true, filled).items():
                    by_name.setdefault(f"{name}{suffix}", []).append(value)
        by_batch.append(by_name)
    of_all = share.of_all_batches(by_batch)
    means = {name: float(np.mean([value for found in of_all for value in found[name]])) for name in of_all[0]}
    hold_out = HoldOut(model, batches, runtime, share).run()
    variance = {name: hold_out[name] for name in ("explained_variance", "explained_variance_interpolation")}
    return {**means, **variance}, note


def _compare(metrics: Any, true: np.ndarray[Any, Any], filled: np.ndarray[Any, Any]) -> dict[str, float]:
    """PSNR and SSIM of one image (C, *size) whose range is 1; SSIM from 3 pixels a side."""
    smallest = min(true.shape[1:])
    window = min(_WINDOW, smallest - 1 + smallest % 2)  # an odd number of pixels
    with np.errstate(divide="ignore"):  # equal pictures have no noise at all
        ratio = float(metrics.peak_signal_noise_ratio(true, filled, data_range=1.0))
    values = {"psnr": min(ratio, _PSNR_LIMIT)}
    if window >= 3:
        similarity = metrics.structural_similarity(true, filled, win_size=window, data_range=1.0, channel_axis=0)
        values["ssim"] = float(similarity)
    return values


def _import_metrics() -> Any:
    try:
        return import_module("skimage.metrics")
    except ImportError as error:
        raise ConfigError("PSNR and SSIM need scikit-image", "pip install 'torchmae[eval]'") from error
