"""What is measured on the way while a run trains, on held-out images under one fixed mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchmae.config import EvalConfig
from torchmae.data.loader import Batch, mixed_subset
from torchmae.data.opening import Data
from torchmae.evaluation.diagnostics import FeatureProbe
from torchmae.evaluation.images import EVAL_BATCH, without_stand_ins
from torchmae.evaluation.reconstruction import HoldOut
from torchmae.evaluation.sharing import share
from torchmae.evaluation.subject import Subject, pixels
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.report.pictures import reconstruction_grid
from torchmae.training.run_folder import RunFolder
from torchmae.training.runtime import Runtime
from torchmae.training.tracking import Trackers
from torchmae.training.trainer import Evaluator

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
            yield batch.images, self.masker(VALIDATION_SEED, 0, batch.indices, batch.images.device, batch.valid)


def build_evaluators(
    settings: EvalConfig,
    masker: Masker,
    model: MaskedAutoencoder,
    data: Data,
    runtime: Runtime,
    folder: RunFolder,
    tracker: Trackers,
    *,
    fresh: bool,
) -> list[Evaluator]:
    """What is measured on the way: reconstruction figures, pictures, and where labels exist kNN and a linear probe.

    Each rank measures a share of the images, under the masks of `masker`. With `fresh` the model is untrained: its
    accuracies, and those of raw pixels, are logged as baselines.
    """
    if data.val is None:
        return []
    chosen = mixed_subset(len(data.val), settings.images)
    mine = share(chosen, EVAL_BATCH, runtime.ranks)
    loader = data.val
    kept = loader.kept_batches(mine.rows, EVAL_BATCH)
    hold_out = HoldOut(model, Masked(lambda: without_stand_ins(loader, kept()), masker), runtime, mine)
    pictured = chosen[: settings.pictures]
    (picture_batch,) = loader.eval_batches(pictured, len(pictured))
    picture_mask = masker(VALIDATION_SEED, 0, pictured, runtime.device, picture_batch.valid)

    @torch.no_grad()
    def pictures(step: int) -> dict[str, float]:
        """Saves masked | reconstructed | original; ranks that hold parts of one model compute it together."""
        model.eval()
        result = model.reconstruct(picture_batch.images, picture_mask)
        path = folder.reconstructions / f"step-{step:08d}.png"
        if runtime.ranks.is_main:
            original = data.normalisation.shown(picture_batch.images)
            masked = original.masked_fill(result.removed.cpu(), torch.nan)
            filled = data.normalisation.shown(result.images)
            reconstruction_grid(masked, filled, original, path, note=result.note)
        tracker.log_picture("reconstruction", step, path)
        return {}

    evaluators = [
        Evaluator(settings.count, lambda _: hold_out.run()),
        Evaluator(min(PICTURE_COUNT, settings.count), pictures),
    ]
    probe = FeatureProbe(data.train, data.val, settings)
    if probe.is_possible and settings.knn_count:
        subject = Subject("model", model)
        if fresh:
            by_pixels = {f"{name}_pixels": value for name, value in probe.run(pixels(), runtime).items()}
            untrained = {f"{name}_untrained": value for name, value in probe.run(subject, runtime).items()}
            tracker.log("baseline", 0, {**by_pixels, **untrained, **probe.majority()})
        evaluators.append(Evaluator(min(settings.knn_count, settings.count), lambda _: probe.run(subject, runtime)))
    return evaluators
