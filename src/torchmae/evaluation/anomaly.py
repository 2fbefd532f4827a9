"""Anomaly detection: what does not look like the normal images that a model has seen.

Two kinds of scores, each for images and for patches: how badly a patch is predicted from others around it, and how far
the features lie from those of normal images. No anomaly is needed for either; labels only say how good they are.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from torchmae.data.loader import Batch
from torchmae.data.sources import Source
from torchmae.data.transforms import Normalisation
from torchmae.errors import CheckpointError, DataError
from torchmae.evaluation.images import ImageSet
from torchmae.evaluation.sharing import Share
from torchmae.files import replace_file
from torchmae.nn.mae import MaskedAutoencoder, require_patches
from torchmae.nn.masking import Mask
from torchmae.random import Purpose, permutation, uniform
from torchmae.report.feature_pictures import anomaly_picture
from torchmae.report.pictures import save_png
from torchmae.training.progress import Display
from torchmae.training.runtime import Runtime

FloatArray = npt.NDArray[np.float32]

SCORES = ("reconstruction", "reconstruction_max", "knn", "patch_knn", "patch_knn_max")
MAX_MASKS = 16
MAX_TOKENS = 20000
NEIGHBOURS = 5
PICTURED = 16

_MODE = {1: "linear", 2: "bilinear", 3: "trilinear"}
_MAX_VALUES = 2**24  # cosines that are held at a time: 64 MB


class Detection(NamedTuple):
    """How unusual test images are, on the CPU; larger is more unusual.

    Attributes:
        scores: (N,) float32 by name:
            reconstruction: mean squared error of an image's patches, each predicted from others;
            reconstruction_max: that of its worst patch, for small defects;
            knn: mean cosine distance of its mean feature to the nearest ones of normal images;
            patch_knn: mean over its patches of the distance to the nearest patch of normal images;
            patch_knn_max: that of its oddest patch, for small defects.
        maps: (N, L) float32 by name, "reconstruction" and "patch_knn": the same for each patch.
        anomalous: (N,) bool, the truth.
    """

    scores: dict[str, Tensor]
    maps: dict[str, Tensor]
    anomalous: Tensor


def run(
    model: MaskedAutoencoder,
    normal: ImageSet,
    test: ImageSet,
    *,
    runtime: Runtime,
    ratio: float = 0.75,
    rounds: int = 2,
    seed: int = 0,
    normalisation: Normalisation | None = None,
    out: Path | None = None,
    display: Display | None = None,
) -> dict[str, float]:
    """How well a model tells anomalous test images from normal ones.

    Args:
        model: the pre-trained model.
        normal: normal images, which need no labels.
        test: images labelled 0 for normal and 1 for anomalous, as `anomaly_data.open_anomaly_data` gives them.
        runtime: where to compute.
        ratio: share of the patches that is hidden at a time, in (0, 1); that of training is the one to take.
        rounds: how many times every image is cut into groups of patches anew; more are steadier.
        seed: of the masks, and of the normal patches that are kept.
        normalisation: of the images; needed for `out`.
        out: a folder for anomaly_scores.csv and, of 2-D images, anomaly.png: the most unusual images with maps of
            what is unusual in them. None: nothing is written.
        display: shows progress.

    Returns:
        anomaly_NAME, the area under the ROC curve in [0, 1], for each name in `SCORES`: how likely an anomalous image
        gets a higher score than a normal one; 0.5 is chance.

    Raises:
        ConfigError: a model without patches.
        DataError: test images of one kind only.
        CheckpointError: `out` cannot be written.
    """
    detection = detect(model, normal, test, runtime=runtime, ratio=ratio, rounds=rounds, seed=seed, display=display)
    figures = {name: auroc(values, detection.anomalous) for name, values in detection.scores.items()}

    def write() -> None:
        assert out is not None
        assert normalisation is not None
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write to {out}: {error.strerror}", "choose another folder") from error
        write_scores(out / "anomaly_scores.csv", test.source, detection)
        shown = detection.scores["patch_knn"].argsort(descending=True, stable=True)[:PICTURED]
        images = torch.cat([batch.images.cpu() for batch in test.only(shown.numpy()).batches()])
        if images.ndim == 4:
            words = ["anomalous" if flag else "normal" for flag in detection.anomalous[shown].tolist()]
            maps = heat_maps(detection, shown, model.encoder.grid, images.shape[2:])
            save_png(anomaly_picture(normalisation.shown(images), maps, words), out / "anomaly.png")

    if out is not None:
        runtime.ranks.on_main(write)
    return {f"anomaly_{name}": value for name, value in figures.items()}


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
    display: Display | None = None,
) -> Detection:
    """Scores of all test images; arguments and errors as for `run`."""
    require_patches(model, "to find anomalies by")
    display = display or Display("none")
    model.eval()
    means, tokens = normal_features(model, normal, runtime, seed, display)
    mine = test.share(runtime.ranks)
    scores: dict[str, list[Tensor]] = {name: [] for name in SCORES}
    maps: dict[str, list[Tensor]] = {"reconstruction": [], "patch_knn": []}
    labels = []
    for batch in counted(test, mine, "test images", display):
        with runtime.autocast():
            features = model.encode(batch.images, "tokens").float()
        noise = [uniform(seed, i, batch.indices, Purpose.MASK, model.encoder.num_patches) for i in range(rounds)]
        errors = torch.stack(
            [patch_errors(model, batch.images, torch.from_numpy(u).to(runtime.device), ratio, runtime) for u in noise]
        ).mean(0)
        distances = tokens.distance(features.flatten(0, 1), 1).view(errors.shape)
        nearest = means.distance(features.mean(1), NEIGHBOURS)
        values = (errors.mean(1), errors.amax(1), nearest, distances.mean(1), distances.amax(1))
        for name, value in zip(SCORES, values, strict=True):
            scores[name].append(value)
        maps["reconstruction"].append(errors)
        maps["patch_knn"].append(distances)
        labels.append(batch.labels)

    def of_all(values: list[Tensor]) -> Tensor:
        (found,) = mine.of_all_images(torch.cat(values))
        return found.cpu()

    return Detection(
        {name: of_all(values) for name, values in scores.items()},
        {name: of_all(values) for name, values in maps.items()},
        of_all(labels) == 1,
    )


def mask_groups(length: int, ratio: float) -> tuple[int, int]:
    """Into how many equal groups patches are cut, and how many of these are hidden at a time.

    Of the divisors of `length` up to `MAX_MASKS`, the one whose share comes nearest to `ratio`, the smallest of
    equals; a length without any (a prime, say) is cut by its smallest.

    Args:
        length: patches, at least 2.
        ratio: share to hide, in (0, 1).
    """
    divisors = [d for d in range(2, length + 1) if length % d == 0]
    choices = [(d, min(max(round(d * ratio), 1), d - 1)) for d in divisors if d <= MAX_MASKS or d == divisors[0]]
    return min(choices, key=lambda choice: abs(choice[1] / choice[0] - ratio))


def covering_masks(noise: Tensor, ratio: float) -> list[Mask]:
    """Masks that together hide every patch exactly equally often.

    The patches of each image are dealt into equal groups at random; each mask hides a run of these groups in a ring,
    beginning with another one.

    Args:
        noise: (B, L) uniform random numbers.
        ratio: share to hide, in (0, 1); the nearest that equal groups allow is taken (`mask_groups`).
    """
    count, hidden = mask_groups(noise.shape[1], ratio)
    groups = noise.argsort(dim=1, stable=True).view(len(noise), count, -1)
    rings = [groups.roll(-first, dims=1) for first in range(count)]
    return [Mask(ring[:, hidden:].flatten(1), ring[:, :hidden].flatten(1)) for ring in rings]


def patch_errors(model: MaskedAutoencoder, images: Tensor, noise: Tensor, ratio: float, runtime: Runtime) -> Tensor:
    """How badly each patch is predicted: (B, L) mean squared error over all masks that hide it.

    Errors are in the space of the model's target; where that is patches normalised by their own statistics, a patch
    of the wrong brightness is no anomaly.

    Args:
        model: in eval mode.
        images: (B, C, *size).
        noise: (B, L) uniform random numbers.
        ratio: as for `covering_masks`.
        runtime: where to compute.
    """
    masks = covering_masks(noise, ratio)
    total = torch.zeros(noise.shape, device=images.device)
    for mask in masks:
        with runtime.autocast():
            output = model(images, mask)
        guess = model.target.hidden_predictions(output.pred, mask)
        error = (guess - model.target.hidden_values(images, mask)).square().mean(-1)
        total.scatter_add_(1, mask.ids_masked, error)
    times = len(masks) * masks[0].ids_masked.shape[1] // noise.shape[1]
    return total / times


class Memory:
    """Features of normal images, to measure the distance to.

    They are not centred, as kNN classification does: seen from the middle of the normal ones, an image far outside
    lies in the same direction as many that are normal.

    Args:
        features: (N, D).
    """

    def __init__(self, features: Tensor) -> None:
        self._directions = F.normalize(features, dim=1)

    def __len__(self) -> int:
        return len(self._directions)

    def distance(self, queries: Tensor, k: int) -> Tensor:
        """Mean cosine distance, 0 to 2, to the k nearest.

        Args:
            queries: (M, D).
            k: neighbours; all N when there are fewer.

        Returns:
            (M,).
        """
        found = [
            (F.normalize(part, dim=1) @ self._directions.T).topk(min(k, len(self)), dim=1).values.mean(1)
            for part in torch.split(queries, max(1, _MAX_VALUES // len(self)))
        ]
        return 1 - torch.cat(found)


def normal_features(
    model: MaskedAutoencoder, normal: ImageSet, runtime: Runtime, seed: int, display: Display
) -> tuple[Memory, Memory]:
    """The mean features of all normal images, and `MAX_TOKENS` of their patch features, evenly from all images."""
    per_image = min(max(-(-MAX_TOKENS // len(normal)), 1), model.encoder.num_patches)
    mine = normal.share(runtime.ranks)
    means, tokens = [], []
    for batch in counted(normal, mine, "normal images", display):
        with runtime.autocast():
            features = model.encode(batch.images, "tokens").float()
        order = uniform(seed, 0, batch.indices, Purpose.SUBSET, features.shape[1]).argsort(axis=1)[:, :per_image]
        chosen = torch.from_numpy(order).to(features.device).unsqueeze(-1).expand(-1, -1, features.shape[2])
        means.append(features.mean(1))
        tokens.append(features.gather(1, chosen))
    mean, token = mine.of_all_images(torch.cat(means), torch.cat(tokens))
    kept = token.flatten(0, 1)
    subset = permutation(seed, 1, len(kept), Purpose.SUBSET)[:MAX_TOKENS]
    return Memory(mean), Memory(kept[torch.from_numpy(subset).to(kept.device)])


def counted(images: ImageSet, mine: Share, what: str, display: Display) -> Iterator[Batch]:
    """The batches of a share of the images; the display is told how far they are."""
    done = 0
    for batch in images.only(mine.rows).batches():
        yield replace(batch, indices=mine.rows[batch.indices])
        done += len(batch.indices)
        display.preparing(what, done, len(mine.rows))


def auroc(scores: Tensor, anomalous: Tensor) -> float:
    """Area under the ROC curve, in [0, 1]; DataError when the images are all normal or all anomalous."""
    if bool(anomalous.all()) or not bool(anomalous.any()):
        kind = "anomalous" if bool(anomalous.any()) else "normal"
        raise DataError(f"all {len(anomalous)} test images are {kind}", "give normal and anomalous ones")
    return float(roc_auc_score(anomalous.numpy(), scores.numpy()))


# Files.


def write_scores(path: Path, source: Source, detection: Detection) -> None:
    """A table of all test images: path, anomalous (0 or 1), and each score; CheckpointError if it cannot be written."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["path", "anomalous", *detection.scores])
    columns = torch.stack(list(detection.scores.values()), dim=1).tolist()
    for i, (values, anomalous) in enumerate(zip(columns, detection.anomalous.tolist(), strict=True)):
        table.writerow([source.name(i), int(anomalous), *(f"{value:.6g}" for value in values)])
    replace_file(path, text.getvalue().encode("utf-8"))


def upsample(maps: Tensor, grid: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """Values of patches as values of pixels, smoothly: (N, L) to (N, *size)."""
    assert maps.shape[1] == prod(grid)
    return F.interpolate(maps.view(len(maps), 1, *grid), size=size, mode=_MODE[len(size)], align_corners=False)[:, 0]


def heat_maps(
    detection: Detection, shown: Tensor, grid: tuple[int, ...], size: tuple[int, ...]
) -> dict[str, FloatArray]:
    """Maps of what is unusual in some test images, by name: (M, *size) in [0, 1].

    A value means the same in all maps of one kind: 0 is the 1st percentile of all test images, 1 the 99.9th.

    Args:
        detection: its maps.
        shown: (M,) which test images.
        grid: patches along each axis.
        size: of the images.
    """
    found = {}
    for name, maps in detection.maps.items():
        low, high = np.percentile(maps.numpy(), [1, 99.9])
        found[name] = ((upsample(maps[shown], grid, size).numpy() - low) / max(high - low, 1e-12)).clip(0, 1)
    return found
