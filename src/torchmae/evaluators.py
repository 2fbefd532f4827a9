"""The evaluators of a pre-training run: figures and pictures of held-out images under fixed masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from torchmae.config import EvalConfig
from torchmae.data.loader import Batch, mixed_subset
from torchmae.data.opening import Data
from torchmae.evaluation.diagnostics import FeatureProbe, encoding_time
from torchmae.evaluation.images import EVAL_BATCH, without_stand_ins
from torchmae.evaluation.reconstruction import HoldOut
from torchmae.evaluation.sharing import share
from torchmae.evaluation.subject import Subject, pixels
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.report.panels import Look
from torchmae.report.pictures import reconstruction_grid
from torchmae.training.pretrained import Prepared
from torchmae.training.run_folder import RunFolder
from torchmae.training.runtime import Runtime
from torchmae.training.tracking import Trackers
from torchmae.training.trainer import Evaluator
from torchmae.visualize import triplet

PICTURE_COUNT = 4
SHARE = 0.1  # of a run's time that measurements may take
LEAST_S = 60.0  # seconds that they may take in any run
FEWEST = 100  # images: figures of fewer say little
# Of validation masks in all runs, so that runs can be compared.
VALIDATION_SEED = 0


@dataclass(frozen=True)
class Masked:
    """Images and masks, the same at each iteration, one batch at a time on the device."""

    batches: Callable[[], Iterator[Batch]]
    masker: Masker

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        for batch in self.batches():
            yield batch.images, self.masker(VALIDATION_SEED, 0, batch.indices, batch.images.device, batch.valid)


def within_budget(settings: EvalConfig, data: Data, image_s: float, run_s: float) -> EvalConfig:
    """Settings with fewer images where measurements would take more than `SHARE` of a run's time, and LEAST_S.

    Args:
        settings: the images asked for.
        data: the images that there are.
        image_s: seconds to encode an image.
        run_s: seconds of the run.
    """
    assert data.val is not None
    train, val = len(data.train), len(data.val)
    limits = {"images": val}
    if data.train.labels is not None and settings.knn_count:
        limits |= {"knn_train": train, "knn_val": val, "linear_train": train}
    used = {name: min(getattr(settings, name), limit) for name, limit in limits.items()}
    # Each probe, once more for the untrained network; a reconstruction costs about as much as encoding the image.
    probed = used.get("knn_train", 0) + used.get("knn_val", 0)
    images = probed * (settings.knn_count + 1) + used["images"] * settings.count
    share = max(LEAST_S, SHARE * run_s) / (images * image_s)
    if share >= 1:
        return settings
    return replace(settings, **{name: max(min(count, FEWEST), int(count * share)) for name, count in used.items()})


def affordable(
    settings: EvalConfig, model: MaskedAutoencoder, data: Data, runtime: Runtime, *, epochs: int, minutes: float | None
) -> tuple[EvalConfig, str]:
    """`within_budget` at the measured speed, for a run of `minutes`, else of `epochs`; and a line where that is fewer.

    An epoch is taken to last as long as encoding its images once, which is about what a training step costs.
    """
    if data.val is None:
        return settings, ""
    (image_s,) = runtime.ranks.all_reduce_max(encoding_time(model, data.val, runtime))
    chosen = within_budget(settings, data, image_s, 60 * minutes if minutes else epochs * len(data.train) * image_s)
    values = {item.name: getattr(chosen, item.name) for item in fields(chosen)}
    fewer = (f"eval.{name} {value}" for name, value in values.items() if value != getattr(settings, name))
    what = "fewer images are measured, so that it takes no more than a tenth of the run's time"
    return chosen, "" if chosen == settings else f"{what}: {', '.join(fewer)}"


def build_evaluators(
    settings: EvalConfig,
    masker: Masker,
    model: MaskedAutoencoder,
    data: Data,
    runtime: Runtime,
    folder: RunFolder,
    tracker: Trackers,
    look: Look,
    *,
    fresh: bool,
) -> tuple[list[Evaluator], FeatureProbe | None]:
    """The evaluators: reconstruction figures, pictures, and with labels kNN and a linear probe, given beside them.

    Each rank measures a share of the images, under the masks of `masker`; pictures have the `look`. `fresh`: the model
    is untrained, and its accuracies and those of raw pixels are logged as baselines.
    """
    if data.val is None:
        return [], None
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
        """Saves a `reconstruction_grid`; all ranks compute it, because they may hold parts of one model."""
        model.eval()
        result = model.reconstruct(picture_batch.images, picture_mask)
        path = folder.reconstructions / f"step-{step:08d}.png"
        if runtime.ranks.is_main:
            shown = Prepared(picture_batch.images, picture_batch.valid, ())
            reconstruction_grid(*triplet(data.normalisation, shown, result, look), path, note=result.note)
        tracker.log_picture("reconstruction", step, path)
        return {}

    evaluators = [
        Evaluator(settings.count, lambda _: hold_out.run()),
        Evaluator(min(PICTURE_COUNT, settings.count), pictures),
    ]
    probe = FeatureProbe(data.train, data.val, settings)
    if not probe.is_possible or not settings.knn_count:
        return evaluators, None
    subject = Subject("model", model)
    if fresh:
        by_pixels = {f"{name}_pixels": value for name, value in probe.run(pixels(), runtime).items()}
        untrained = {f"{name}_untrained": value for name, value in probe.run(subject, runtime).items()}
        tracker.log("baseline", 0, {**by_pixels, **untrained, **probe.majority()})
    count = min(settings.knn_count, settings.count)
    evaluators.append(Evaluator(count, lambda step: probe.run(subject, runtime, step)))
    return evaluators, probe
