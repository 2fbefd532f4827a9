"""What is measured on the way while a run trains, on held-out images under one fixed mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchmae.config import PretrainConfig
from torchmae.data.loader import Batch, mixed_subset
from torchmae.data.opening import Data
from torchmae.evaluation.diagnostics import FeatureProbe
from torchmae.evaluation.reconstruction import HoldOut
from torchmae.evaluation.sharing import share
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.report.pictures import reconstruction_grid
from torchmae.training.run_folder import RunFolder
from torchmae.training.runtime import Runtime
from torchmae.training.tracking import Trackers
from torchmae.training.trainer import Evaluator

EVAL_BATCH = 250
PICTURE_COUNT = 4
# Validation masks are drawn from this seed, whatever the run's, so that runs can be compared.
VALIDATION_SEED = 0


@dataclass(frozen=True)
class Masked:
    """Images and their masks, the same at each iteration; one batch at a time is on the device."""

    batches: Callable[[], Iterator[Batch]]
    masker: Masker

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        for batch in self.batches():
            yield batch.images, self.masker(VALIDATION_SEED, 0, batch.indices, batch.images.device)


def build_evaluators(
    config: PretrainConfig,
    model: MaskedAutoencoder,
    data: Data,
    runtime: Runtime,
    folder: RunFolder,
    tracker: Trackers,
    *,
    fresh: bool,
) -> list[Evaluator]:
    """What is measured on the way: reconstruction figures, pictures, and where labels exist kNN and a linear probe.

    Each rank measures a share of the images. With `fresh` the model is untrained: its accuracies, and those of raw
    pixels, are logged as baselines.
    """
    if data.val is None:
        return []
    chosen = mixed_subset(len(data.val), config.eval.images)
    mine = share(chosen, EVAL_BATCH, runtime.ranks)
    masker = Masker(model.encoder, config.mask.strategy, config.mask.ratio)  # the same masks, whatever the schedule
    hold_out = HoldOut(model, Masked(data.val.kept_batches(mine.rows, EVAL_BATCH), masker), runtime, mine)
    pictured = chosen[: config.eval.pictures]
    (picture_batch,) = data.val.eval_batches(pictured, len(pictured))
    images, picture_mask = picture_batch.images, masker(VALIDATION_SEED, 0, pictured, runtime.device)

    def pictures(step: int) -> dict[str, float]:
        path = folder.reconstructions / f"step-{step:08d}.png"
        draw_pictures(model, data, images, picture_mask, path if runtime.ranks.is_main else None)
        tracker.log_picture("reconstruction", step, path)
        return {}

    evaluators = [
        Evaluator(config.eval.count, lambda _: hold_out.run()),
        Evaluator(min(PICTURE_COUNT, config.eval.count), pictures),
    ]
    probe = FeatureProbe(data.train, data.val, config.eval)
    if probe.is_possible and config.eval.knn_count:
        if fresh:
            untrained = {f"{name}_untrained": value for name, value in probe.run(model, runtime).items()}
            by_pixels = {f"{name}_pixels": value for name, value in probe.run_on_pixels(runtime.ranks).items()}
            tracker.log("baseline", 0, {**by_pixels, **untrained, **probe.majority()})
        evaluators.append(Evaluator(min(config.eval.knn_count, config.eval.count), lambda _: probe.run(model, runtime)))
    return evaluators


@torch.no_grad()
def draw_pictures(model: MaskedAutoencoder, data: Data, images: Tensor, mask: Any, path: Path | None) -> None:
    """Saves masked | reconstructed | original; without a path, only takes part in what ranks compute together."""
    model.eval()
    result = model.reconstruct(images, mask)
    if path is None:
        return
    original = data.normalisation.shown(images)
    masked = original.masked_fill(result.removed.cpu(), torch.nan)
    filled = data.normalisation.shown(result.images)
    reconstruction_grid(masked, filled, original, path, note=result.note)
