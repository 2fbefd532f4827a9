"""Quality of reconstructions: PSNR and SSIM of whole images, explained variance of the masked values."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from torchmae.config.evaluate import EvaluateOptions
from torchmae.data.items import Valid
from torchmae.errors import one_of, require
from torchmae.evaluation.bench import Bench
from torchmae.evaluation.images import fixed_rows
from torchmae.evaluation.inpainting import interpolate
from torchmae.evaluation.reconstruction import HoldOut
from torchmae.evaluation.scores import Result
from torchmae.evaluation.subject import Subject
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker

Pixels: TypeAlias = npt.NDArray[np.float32]
_WINDOW = 7  # scikit-image's default side of SSIM's window
_PSNR_LIMIT = 100.0  # dB, an error of 1e-5; in place of infinity, which would spoil a mean


def strategies_of(model: MaskedAutoencoder) -> tuple[str, ...]:
    """The mask strategies of a model that an evaluation measures."""
    return tuple(name for name, strategy in model.encoder.strategies.items() if strategy.evaluated)


@torch.no_grad()
def measure(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    """PSNR and SSIM (scikit-image's) of test images with the visible part pasted in, and explained variance.

    The figures are `<strategy>_<ratio>_psnr` (dB, mean over images), `_ssim`, `_explained_variance` (of the masked
    values, in the target's space), and the same of interpolation. The seed and an image's index decide its mask.

    Raises:
        ConfigError: scikit-image is not installed, or a strategy that the model does not have.
    """
    assert subject.model is not None
    metrics = require("skimage.metrics", "eval")
    model, runtime, normalisation = subject.model, bench.runtime, bench.data.normalisation
    chosen = fixed_rows(len(bench.data.test), options.reconstruction.images)
    mine, shared = bench.data.test.only(chosen).shared(runtime.ranks, "reading test images")
    batches = [*shared]
    known = strategies_of(model)
    figures: dict[str, float] = {}
    notes: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    for strategy in options.reconstruction.strategies or known:
        one_of("reconstruction.strategies", strategy, known)
        for ratio in options.reconstruction.ratios:
            masker = Masker(model.encoder, strategy, ratio)
            masked = [
                (batch.images, masker(options.seed, 0, batch.indices, runtime.device, batch.valid)) for batch in batches
            ]
            found, note = [], ""
            for batch, (images, mask) in zip(batches, masked, strict=True):
                with runtime.autocast():
                    filled = model.reconstruct(images, mask)
                note = filled.note
                versions = (images, filled.images, interpolate(images, filled.removed))
                shown = (normalisation.shown(item).numpy() for item in versions)
                valid = [None] * len(images) if batch.valid is None else batch.valid[:, 0].cpu().numpy()
                found.append(
                    [
                        _compare(metrics, true, guess, kept)
                        | _compare(metrics, true, interpolated, kept, "_interpolation")
                        for true, guess, interpolated, kept in zip(*shown, valid, strict=True)
                    ]
                )
            of_all = [item for batch in mine.of_all_batches(found) for item in batch]
            values = {name: float(np.mean([item[name] for item in of_all])) for name in of_all[0]}
            hold_out = HoldOut(model, masked, runtime, mine).run()
            values |= {name: hold_out[name] for name in ("explained_variance", "explained_variance_interpolation")}
            rows.append({"strategy": strategy, "ratio": ratio, **values})
            figures |= {f"{strategy}_{ratio:g}_{name}": value for name, value in values.items()}
            notes[f"PSNR and SSIM: {note}"] = None
    count = sum(mine.of_all_batches([len(batch.images) for batch in batches]))
    return Result(figures, {"images": count, "rows": rows}, tuple(notes))


def _compare(
    metrics: Any, true: Pixels, filled: Pixels, valid: Valid | None = None, suffix: str = ""
) -> dict[str, float]:
    """PSNR and SSIM of one image (C, *size) in [0, 1], over its pixels with data; SSIM needs 3 pixels a side."""
    smallest = min(true.shape[1:])
    window = min(_WINDOW, smallest - 1 + smallest % 2)  # an odd number of pixels
    pair = (true, filled) if valid is None else (true[:, valid], filled[:, valid])
    with np.errstate(divide="ignore"):  # of equal images the noise is 0
        ratio = float(metrics.peak_signal_noise_ratio(*pair, data_range=1.0))
    values = {f"psnr{suffix}": min(ratio, _PSNR_LIMIT)}
    if window >= 3:
        similarity, each = metrics.structural_similarity(
            true, filled, win_size=window, data_range=1.0, channel_axis=0, full=True
        )
        values[f"ssim{suffix}"] = float(similarity if valid is None else each[:, valid].mean())
    return values
