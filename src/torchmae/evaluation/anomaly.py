"""Anomaly detection by a model and normal images alone.

Two kinds of scores, for images and for patches: the error of predicting a patch from others, and the distance of
features from those of normal images. Labels of the test images only serve to measure the scores.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from torchmae.config.evaluate import EvaluateOptions
from torchmae.data.sources import Source
from torchmae.errors import DataError
from torchmae.evaluation.bench import Bench, output_folder
from torchmae.evaluation.images import ImageSet
from torchmae.evaluation.inpainting import LINEAR
from torchmae.evaluation.knn import nearest_directions
from torchmae.evaluation.scores import Result
from torchmae.evaluation.subject import Subject
from torchmae.files import replace_file
from torchmae.nn.mae import MaskedAutoencoder, require_patches
from torchmae.nn.masking import Mask
from torchmae.nn.patches import patchify
from torchmae.random import Purpose, permutation, uniform
from torchmae.report.feature_pictures import anomaly_picture
from torchmae.report.panels import Look
from torchmae.report.pictures import save_png
from torchmae.training.runtime import Runtime

FloatArray = npt.NDArray[np.float32]

SCORES = ("reconstruction", "reconstruction_max", "knn", "patch_knn", "patch_knn_max")
MAX_MASKS = 16
MAX_TOKENS = 20000
NEIGHBOURS = 5
PICTURED = 16


class Detection(NamedTuple):
    """Anomaly scores of the test images, on the CPU; a larger score is more unusual.

    Attributes:
        scores: (N,) float32 by name:
            reconstruction: mean squared error of the image's patches, each predicted from others;
            reconstruction_max: the error of the worst patch, for small defects;
            knn: mean cosine distance of the mean feature to the nearest ones of normal images;
            patch_knn: mean over the patches of the distance to the nearest patch of normal images;
            patch_knn_max: the largest distance of a patch, for small defects.
        maps: (N, L) float32, "reconstruction" and "patch_knn" of each patch.
        anomalous: (N,) bool, the truth.
        rows: (N,) indices of these images among the test images; unreadable ones are missing.
    """

    scores: dict[str, Tensor]
    maps: dict[str, Tensor]
    anomalous: Tensor
    rows: Tensor


def measure(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    """Area under the ROC curve, in [0, 1], as anomaly_NAME for each name in `SCORES`; calls `write_files`.

    The area is the probability that an anomalous image gets a higher score than a normal one; 0.5 is chance.
    """
    assert subject.model is not None
    data, model, out = bench.data, subject.model, output_folder(bench.run, options)
    detection = detect(model, data.train, data.test, runtime=bench.runtime, ratio=bench.mask_ratio, seed=options.seed)
    figures = {f"anomaly_{name}": auroc(values, detection.anomalous) for name, values in detection.scores.items()}
    grid = model.encoder.grid
    written = bench.runtime.ranks.on_main(lambda: write_files(out, detection, data.test, grid, bench.look))
    return Result(figures, {}, (f"{' and '.join(written)} {'are' if len(written) > 1 else 'is'} in {out}",))


@torch.no_grad()
def detect(
    model: MaskedAutoencoder,
    normal: ImageSet,
    test: ImageSet,
    *,
    runtime: Runtime,
    ratio: float = 0.75,
    rounds: int = 2,
    seed: int = 0,
) -> Detection:
    """Scores of all test images, labelled 0 for normal and 1 for anomalous; ConfigError for a model without patches.

    Args:
        model: the pre-trained model.
        normal: normal images; their labels are not used.
        test: test images of `anomaly_data.open_anomaly_data`.
        runtime: where to compute.
        ratio: share of patches that a mask removes, in (0, 1), best that of training.
        rounds: number of random groupings of an image's patches; more rounds reduce the noise.
        seed: of the masks, and of the choice of normal patches.
    """
    require_patches(model, "to find anomalies by")
    model.eval()
    means, tokens = normal_features(model, normal, runtime, seed)
    mine, batches = test.shared(runtime.ranks, "test images")
    found: list[dict[str, Tensor]] = []
    for batch in batches:
        with runtime.autocast():
            features = model.encode(batch.images, "tokens", batch.valid).float()
        noise = [uniform(seed, i, batch.indices, Purpose.MASK, model.encoder.num_patches) for i in range(rounds)]
        errors = torch.stack(
            [
                patch_errors(model, batch.images, torch.from_numpy(u).to(runtime.device), ratio, runtime, batch.valid)
                for u in noise
            ]
        ).mean(0)
        distances = distance(tokens, features.flatten(0, 1), 1).view(errors.shape)
        if batch.valid is not None:  # a patch without data is no anomaly
            distances = distances * patchify(batch.valid, model.patch_size).any(-1)
        nearest = distance(means, features.mean(1), NEIGHBOURS)
        values = (errors.mean(1), errors.amax(1), nearest, distances.mean(1), distances.amax(1))
        kept = {"maps_reconstruction": errors, "maps_patch_knn": distances, "labels": batch.labels}
        rows = torch.from_numpy(batch.indices).to(runtime.device)
        found.append({**dict(zip(SCORES, values, strict=True)), **kept, "rows": rows})
    of_all = mine.of_all_images(*([item[name] for item in found] for name in found[0]))
    by_name = {name: values.cpu() for name, values in zip(found[0], of_all, strict=True)}
    return Detection(
        {name: by_name[name] for name in SCORES},
        {name: by_name[f"maps_{name}"] for name in ("reconstruction", "patch_knn")},
        by_name["labels"] == 1,
        by_name["rows"],
    )


def mask_groups(length: int, ratio: float) -> tuple[int, int]:
    """Number of equal groups of `length` patches, 2 or more, and the number of groups that one mask removes.

    The number of groups is the divisor of `length`, at most `MAX_MASKS`, whose share comes nearest to `ratio`, on a tie
    the smallest; if there is none (`length` is a prime, say), the smallest divisor.
    """
    divisors = [d for d in range(2, length + 1) if length % d == 0]
    choices = [(d, min(max(round(d * ratio), 1), d - 1)) for d in divisors if d <= MAX_MASKS or d == divisors[0]]
    return min(choices, key=lambda choice: abs(choice[1] / choice[0] - ratio))


def covering_masks(noise: Tensor, ratio: float) -> list[Mask]:
    """Masks that together remove every patch equally often.

    `noise`, (B, L) uniform random numbers, divides each image's patches into equal groups in a ring (`mask_groups`);
    each mask removes neighbouring groups, starting one group further on.
    """
    count, masked = mask_groups(noise.shape[1], ratio)
    groups = noise.argsort(dim=1, stable=True).view(len(noise), count, -1)
    rings = [groups.roll(-first, dims=1) for first in range(count)]
    return [Mask(ring[:, masked:].flatten(1), ring[:, :masked].flatten(1)) for ring in rings]


def patch_errors(
    model: MaskedAutoencoder, images: Tensor, noise: Tensor, ratio: float, runtime: Runtime, valid: Tensor | None = None
) -> Tensor:
    """Mean squared error (B, L) of each patch over all masks of `covering_masks` that remove it.

    Errors are in the space of the model's target: if it normalises patches, a patch of the wrong brightness is no
    anomaly. Pixels that are not `valid`, (B, 1, *size) bool, do not count; a patch of such pixels has no error.
    """
    masks = covering_masks(noise, ratio)
    if valid is not None:
        masks = [mask._replace(valid=patchify(valid, model.patch_size)) for mask in masks]
    total = torch.zeros(noise.shape, device=images.device)
    for mask in masks:
        with runtime.autocast():
            output = model(images, mask)
        guess = model.target.hidden_predictions(output.pred, mask)
        error = (guess - model.target.hidden_values(images, mask)).square()
        weights = model.target.weights(mask)
        if weights is not None:
            error = error * weights / weights.expand_as(error).mean(-1, keepdim=True).clamp(min=1e-6)
        error = error.mean(-1)
        total.scatter_add_(1, mask.ids_masked, error)
    times = len(masks) * masks[0].ids_masked.shape[1] // noise.shape[1]
    return total / times


def distance(normal: Tensor, queries: Tensor, k: int) -> Tensor:
    """Mean cosine distance (M,), 0 to 2, of (M, D) queries to the k nearest of normal features, (N, D) of length 1.

    Features are not centred, unlike in kNN classification: seen from the centre of the normal features, an image far
    outside lies in the same direction as many normal ones.
    """
    return 1 - torch.cat([cosine.mean(1) for _, cosine in nearest_directions(normal, queries, k)])


def normal_features(model: MaskedAutoencoder, normal: ImageSet, runtime: Runtime, seed: int) -> tuple[Tensor, Tensor]:
    """The mean features of all normal images, and `MAX_TOKENS` patch features, evenly from all images; of length 1."""
    per_image = min(max(-(-MAX_TOKENS // len(normal)), 1), model.encoder.num_patches)
    mine, batches = normal.shared(runtime.ranks, "normal images")
    means, tokens = [], []
    for batch in batches:
        with runtime.autocast():
            features = model.encode(batch.images, "tokens", batch.valid).float()
        noise = torch.from_numpy(uniform(seed, 0, batch.indices, Purpose.SUBSET, features.shape[1])).to(features.device)
        if batch.valid is not None:  # patches without data come last
            noise = noise + ~patchify(batch.valid, model.patch_size).any(-1)
        chosen = noise.argsort(dim=1)[:, :per_image].unsqueeze(-1).expand(-1, -1, features.shape[2])
        means.append(features.mean(1))
        tokens.append(features.gather(1, chosen))
    mean, token = mine.of_all_images(means, tokens)
    kept = token.flatten(0, 1)
    subset = permutation(seed, 1, len(kept), Purpose.SUBSET)[:MAX_TOKENS]
    return F.normalize(mean, dim=1), F.normalize(kept[torch.from_numpy(subset).to(kept.device)], dim=1)


def auroc(scores: Tensor, anomalous: Tensor) -> float:
    """Area under the ROC curve, in [0, 1]; DataError if the images are all normal or all anomalous."""
    if bool(anomalous.all()) or not bool(anomalous.any()):
        kind = "anomalous" if bool(anomalous.any()) else "normal"
        raise DataError(f"all {len(anomalous)} test images are {kind}", "give normal and anomalous ones")
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(anomalous.numpy(), scores.numpy()))


# Files.


def write_files(out: Path, detection: Detection, test: ImageSet, grid: tuple[int, ...], look: Look) -> list[str]:
    """Writes anomaly_scores.csv, and anomaly.png with maps of the most unusual images; returns the names.

    Raises:
        CheckpointError: they cannot be written.
    """
    write_scores(out / "anomaly_scores.csv", test.source, detection)
    shown = detection.scores["patch_knn"].argsort(descending=True, stable=True)[:PICTURED]
    batches = [*test.only(detection.rows[shown].numpy()).batches()]
    images = torch.cat([test.normalisation.shown(batch.images, batch.valid) for batch in batches])
    words = ["anomalous" if flag else "normal" for flag in detection.anomalous[shown].tolist()]
    maps = heat_maps(detection, shown, grid, images.shape[2:])
    empty = np.isinf(images[:, :1].numpy())
    one = Look(look.kind)  # a map has one channel
    flat = {name: one.flat(np.where(empty, np.inf, values[:, None]))[:, 0] for name, values in maps.items()}
    save_png(anomaly_picture(look.flat(images), flat, words, look.kind), out / "anomaly.png")
    return ["anomaly.png", "anomaly_scores.csv"]


def write_scores(path: Path, source: Source, detection: Detection) -> None:
    """Writes a table of all test images: path, anomalous (0 or 1), and each score."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["path", "anomalous", *detection.scores])
    columns = torch.stack(list(detection.scores.values()), dim=1).tolist()
    for row, values, anomalous in zip(detection.rows.tolist(), columns, detection.anomalous.tolist(), strict=True):
        table.writerow([source.name(row), int(anomalous), *(f"{value:.6g}" for value in values)])
    replace_file(path, text.getvalue().encode("utf-8"))


def heat_maps(
    detection: Detection, shown: Tensor, grid: tuple[int, ...], size: tuple[int, ...]
) -> dict[str, FloatArray]:
    """Anomaly maps, (M, *size) in [0, 1] by name, of the M test images in `shown`.

    A value means the same in all maps of one kind: 0 is the 1st percentile of all test images, 1 the 99.9th.
    """
    found = {}
    for name, maps in detection.maps.items():
        low, high = np.percentile(maps.numpy(), [1, 99.9])
        mode = LINEAR[len(size)]
        pixels = F.interpolate(maps[shown].view(-1, 1, *grid), size=size, mode=mode, align_corners=False)
        found[name] = ((pixels[:, 0].numpy() - low) / max(high - low, 1e-12)).clip(0, 1)
    return found
