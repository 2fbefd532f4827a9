"""How well a model fills in what is hidden: PSNR and SSIM of whole pictures, explained variance of hidden pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from torchmae.config.evaluate import EvaluateOptions, ReconstructionOptions
from torchmae.data.formats import Valid
from torchmae.data.loader import Batch
from torchmae.data.transforms import Normalisation
from torchmae.errors import ConfigError, one_of
from torchmae.evaluation.bench import Bench
from torchmae.evaluation.images import EVAL_BATCH, fixed_rows
from torchmae.evaluation.inpainting import interpolate
from torchmae.evaluation.reconstruction import HoldOut
from torchmae.evaluation.scores import Result
from torchmae.evaluation.sharing import Share, share
from torchmae.evaluation.subject import Subject
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.training.runtime import Runtime

Pixels: TypeAlias = npt.NDArray[np.float32]
_WINDOW = 7  # scikit-image's default side of SSIM's window
_PSNR_LIMIT = 100.0  # dB, an error of 1e-5: stands for infinity, which would spoil a mean


def strategies_of(model: MaskedAutoencoder) -> tuple[str, ...]:
    """The mask strategies of a model that are measured."""
    return tuple(name for name, strategy in model.encoder.strategies.items() if strategy.evaluated)


def measure(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    """`measure_model` on some of the test images."""
    assert subject.model is not None
    chosen = fixed_rows(len(bench.data.test), options.reconstruction.images)
    mine = share(np.arange(len(chosen)), EVAL_BATCH, bench.runtime.ranks)
    images = bench.data.test.only(chosen[mine.rows])
    return measure_model(
        subject.model,
        [replace(batch, indices=mine.rows[batch.indices]) for batch in images.batches(None, EVAL_BATCH)],
        mine,
        normalisation=bench.data.normalisation,
        runtime=bench.runtime,
        options=options.reconstruction,
        seed=options.seed,
    )


@torch.no_grad()
def measure_model(
    model: MaskedAutoencoder,
    batches: Sequence[Batch],
    share: Share,
    *,
    normalisation: Normalisation,
    runtime: Runtime,
    options: ReconstructionOptions,
    seed: int = 0,
) -> Result:
    """PSNR and SSIM (scikit-image's) of whole pictures with the visible part pasted, and explained variance.

    Args:
        model: the model.
        batches: images; an image's index decides its mask.
        share: of several ranks, the share of the images that `batches` are; the figures are of all images.
        normalisation: of the images; PSNR and SSIM are of the range that it shows.
        runtime: where to compute.
        options: which masks.
        seed: another one gives other masks.

    Returns:
        figures `<strategy>_<ratio>_psnr` (dB, mean over images), `_ssim`, `_explained_variance` (of the hidden values,
        in the target's space), and each of them once more with `_interpolation`.

    Raises:
        ConfigError: scikit-image is not installed, or a strategy that the model does not have.
    """
    metrics = _import_metrics()
    known = strategies_of(model)
    figures: dict[str, float] = {}
    notes: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    for strategy in options.strategies or known:
        one_of("reconstruction.strategies", strategy, known)
        for ratio in options.ratios:
            masker = Masker(model.encoder, strategy, ratio)
            masked = [(batch.images, masker(seed, 0, batch.indices, runtime.device, batch.valid)) for batch in batches]
            found, note = [], ""
            for batch, (images, mask) in zip(batches, masked, strict=True):
                with runtime.autocast():
                    filled = model.reconstruct(images, mask)
                note = filled.note
                shown = [normalisation.shown(item).numpy() for item in (images, filled.images)]
                shown.append(normalisation.shown(interpolate(images, filled.removed)).numpy())
                valid = [None] * len(images) if batch.valid is None else batch.valid[:, 0].cpu().numpy()
                found.append([_compare_both(metrics, *each) for each in zip(valid, *shown, strict=True)])
            of_all = [item for batch in share.of_all_batches(found) for item in batch]
            values = {name: float(np.mean([item[name] for item in of_all])) for name in of_all[0]}
            hold_out = HoldOut(model, masked, runtime, share).run()
            values |= {name: hold_out[name] for name in ("explained_variance", "explained_variance_interpolation")}
            rows.append({"strategy": strategy, "ratio": ratio, **values})
            figures |= {f"{strategy}_{ratio:g}_{name}": value for name, value in values.items()}
            notes[f"PSNR and SSIM: {note}"] = None
    count = sum(share.of_all_batches([len(batch.labels) for batch in batches]))
    return Result(figures, {"images": count, "rows": rows}, tuple(notes))


def _compare_both(
    metrics: Any, valid: Valid | None, true: Pixels, filled: Pixels, interpolated: Pixels
) -> dict[str, float]:
    beside = _compare(metrics, true, interpolated, valid)
    return {**_compare(metrics, true, filled, valid), **{f"{name}_interpolation": beside[name] for name in beside}}


def _compare(metrics: Any, true: Pixels, filled: Pixels, valid: Valid | None = None) -> dict[str, float]:
    """PSNR and SSIM of one image (C, *size) whose range is 1, over its pixels with data; SSIM from 3 pixels a side."""
    smallest = min(true.shape[1:])
    window = min(_WINDOW, smallest - 1 + smallest % 2)  # an odd number of pixels
    pair = (true, filled) if valid is None else (true[:, valid], filled[:, valid])
    with np.errstate(divide="ignore"):  # equal pictures have no noise at all
        ratio = float(metrics.peak_signal_noise_ratio(*pair, data_range=1.0))
    values = {"psnr": min(ratio, _PSNR_LIMIT)}
    if window >= 3:
        similarity, each = metrics.structural_similarity(
            true, filled, win_size=window, data_range=1.0, channel_axis=0, full=True
        )
        values["ssim"] = float(similarity if valid is None else each[:, valid].mean())
    return values


def _import_metrics() -> Any:
    try:
        return import_module("skimage.metrics")
    except ImportError as error:
        raise ConfigError("PSNR and SSIM need scikit-image", "pip install 'torchmae[eval]'") from error
