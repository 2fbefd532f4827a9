"""Anomaly detection by a model and normal images alone.

Two kinds of scores, for images and for patches: the error of predicting a patch from others, and the distance of
features from those of normal images, as in PatchCore (Roth et al. 2022, arXiv 2106.08265). Labels and masks of the test
images only serve to measure the scores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchmae.config.evaluate import EvaluateOptions
from torchmae.data.loader import Batch
from torchmae.data.sources import Windows
from torchmae.errors import ConfigError, DataError
from torchmae.evaluation.anomaly_data import AnomalyData
from torchmae.evaluation.anomaly_maps import pixel_figures, write_files
from torchmae.evaluation.bench import Bench, output_folder
from torchmae.evaluation.knn import nearest_directions
from torchmae.evaluation.scores import Result
from torchmae.evaluation.subject import RANDOM, Subject
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Mask
from torchmae.nn.patches import grid_size, patchify
from torchmae.random import Purpose, permutation, uniform
from torchmae.training.runtime import Runtime

SCORES = ("reconstruction", "reconstruction_max", "knn", "patch_knn", "patch_knn_max")
MAX_MASKS = 16
MAX_TOKENS = 50_000
"""Largest number of patches of normal images from which a coreset is chosen."""
NEIGHBOURS = 5
PROJECTED = 128
"""Dimensions of the random projection in which a coreset is chosen."""


class Detection(NamedTuple):
    """Anomaly scores of the test images, on the CPU; a larger score is more unusual.

    Attributes:
        scores: (N,) float32 by name; the first two where the model was trained:
            reconstruction: mean squared error of the image's patches, each predicted from others;
            reconstruction_max: the error of the worst patch, for small defects;
            knn: mean cosine distance of the mean feature to the nearest ones of normal images;
            patch_knn: mean over the patches of the distance to the nearest patch of normal images;
            patch_knn_max: the largest distance of a patch, for small defects.
        maps: (S, *grid) of each window, "reconstruction" and "patch_knn" of each patch.
        anomalous: (N,) bool, the truth.
        rows: (N,) rising indices of these images among the test images; unreadable ones are missing.
        windows: (S,) rising indices of the windows in `grid`.
        grid: the windows of all test images.
    """

    scores: dict[str, Tensor]
    maps: dict[str, Tensor]
    anomalous: Tensor
    rows: Tensor
    windows: Tensor
    grid: Windows


def measure(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    """Areas under curves, in [0, 1]; of what is evaluated, files are written too.

    The area under the ROC curve (anomaly_NAME for each name of `Detection.scores`) is the probability that an anomalous
    image gets a higher score than a normal one; 0.5 is chance. With masks, also `pixel_figures` of each map.
    """
    data, runtime = bench.data, bench.runtime
    assert isinstance(data, AnomalyData)
    is_evaluated = subject.name in ("model", bench.run)
    out = output_folder(bench.run, options) if is_evaluated else None
    detection = detect(bench, subject, coreset=options.anomaly.coreset, seed=options.seed)
    figures = {f"anomaly_{name}": auroc(values, detection.anomalous) for name, values in detection.scores.items()}
    if data.masks:
        figures |= runtime.ranks.on_main(lambda: pixel_figures(data, detection, bench.display.preparing))
    if out is None:
        return Result(figures, {})
    written = runtime.ranks.on_main(
        lambda: write_files(out, data, detection, bench.look, every_map=options.anomaly.maps)
    )
    return Result(figures, {}, (f"{' and '.join(written)} {'are' if len(written) > 1 else 'is'} in {out}",))


@torch.no_grad()
def detect(bench: Bench, subject: Subject, *, coreset: float = 1.0, rounds: int = 2, seed: int = 0) -> Detection:
    """Scores of all test images; each image is covered by windows of the model's proportions.

    Args:
        bench: with `AnomalyData`; the training images are the normal ones.
        subject: whose features are compared. Only what was trained predicts patches.
        coreset: share of the normal patches that is kept, in (0, 1].
        rounds: number of random groupings of an image's patches; more rounds reduce the noise.
        seed: of the masks, and of the choice of normal patches.

    Raises:
        ConfigError: a model without patches.
    """
    data, runtime = bench.data, bench.runtime
    assert isinstance(data, AnomalyData)
    if not patch_size(subject):
        raise ConfigError("this model has no patches to find anomalies by", "use a vit model")
    if subject.model is not None:
        subject.model.eval()
    masked = subject.name != RANDOM and subject.model is not None and subject.model.encoder.strategies
    predicts = subject.model if masked else None
    means, tokens = normal_features(bench, subject, coreset, seed)
    test = data.test_windows
    mine, batches = test.shared(runtime.ranks, f"test images, {subject.name}")
    found: list[dict[str, Tensor]] = []
    for batch in batches:
        mean, features = features_of(subject, batch, runtime)
        nearest = distance(tokens, features.flatten(0, 1), 1).view(features.shape[:2])
        kept = {"mean": mean, "patch_knn": nearest, "labels": batch.labels}
        if predicts is not None:
            noise = (
                torch.from_numpy(uniform(seed, i, batch.indices, Purpose.MASK, features.shape[1])).to(runtime.device)
                for i in range(rounds)
            )
            errors = [patch_errors(predicts, batch.images, u, bench.mask_ratio, runtime, batch.valid) for u in noise]
            kept = {"reconstruction": torch.stack(errors).mean(0), **kept}
        if batch.valid is not None:  # a patch without data is no anomaly
            kept["patch_knn"] = nearest * patchify(batch.valid, patch_size(subject)).any(-1)
        found.append({**kept, "windows": torch.from_numpy(batch.indices).to(runtime.device)})
    of_all = mine.of_all_images(*([item[name] for item in found] for name in found[0]))
    by_name = dict(zip(found[0], of_all, strict=True))
    assert isinstance(test.source, Windows) and test.images is not None
    images = torch.from_numpy(test.images).to(runtime.device)[by_name["windows"]]
    rows, groups = torch.unique(images, return_inverse=True)
    maps = {name: by_name[name] for name in ("reconstruction", "patch_knn") if name in by_name}
    scores = {"knn": distance(means, mean_of(by_name["mean"], groups), NEIGHBOURS)}
    for name, values in maps.items():
        scores[name] = mean_of(values.mean(1), groups)
        scores[f"{name}_max"] = scores[name].scatter_reduce(0, groups, values.amax(1), "amax", include_self=False)
    grid = grid_size(data.test.model.input_size, patch_size(subject))
    return Detection(
        {name: scores[name].cpu() for name in SCORES if name in scores},
        {name: values.view(-1, *grid).cpu() for name, values in maps.items()},
        mean_of(by_name["labels"].float(), groups).cpu() == 1,
        rows.cpu(),
        by_name["windows"].cpu(),
        test.source,
    )


def features_of(subject: Subject, batch: Batch, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """The mean feature of the patches with data, (B, D), and those of all patches, (B, L, D)."""
    with runtime.autocast():
        tokens = subject.patch_tokens(batch.images, batch.valid).float()
    if subject.model is None:
        return subject.encode(batch.images, "mean"), tokens
    if batch.valid is None:
        return tokens.mean(1), tokens
    counts = patchify(batch.valid, patch_size(subject)).any(-1).sum(1, keepdim=True).clamp(min=1)
    return tokens.sum(1) / counts, tokens  # the tokens of the others are 0


def patch_size(subject: Subject) -> tuple[int, ...]:
    """Pixels of a patch along each axis."""
    return subject.patch_size if subject.model is None else subject.model.patch_size


def mean_of(values: Tensor, groups: Tensor) -> Tensor:
    """(N, ...) the mean of the values, (S, ...), of each group, numbered from 0."""
    counts = torch.bincount(groups)
    total = values.new_zeros(len(counts), *values.shape[1:]).index_add_(0, groups, values)
    return total / counts.view(-1, *[1] * (values.ndim - 1))


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


def normal_features(bench: Bench, subject: Subject, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """The mean features of all normal images, and a coreset of their patch features; of length 1.

    The coreset is a `share` of at most `MAX_TOKENS` patches, evenly from all images.
    """
    data, runtime = bench.data, bench.runtime
    assert isinstance(data, AnomalyData)
    normal = data.normal_windows
    mine, batches = normal.shared(runtime.ranks, f"normal images, {subject.name}")
    means, tokens, windows = [], [], []
    for batch in batches:
        mean, features = features_of(subject, batch, runtime)
        per_image = min(max(-(-MAX_TOKENS // len(normal)), 1), features.shape[1])
        noise = torch.from_numpy(uniform(seed, 0, batch.indices, Purpose.SUBSET, features.shape[1])).to(features.device)
        if batch.valid is not None:  # patches without data come last
            noise = noise + ~patchify(batch.valid, patch_size(subject)).any(-1)
        chosen = noise.argsort(dim=1)[:, :per_image].unsqueeze(-1).expand(-1, -1, features.shape[2])
        means.append(mean)
        tokens.append(features.gather(1, chosen))
        windows.append(torch.from_numpy(batch.indices).to(features.device))
    mean, token, window = mine.of_all_images(means, tokens, windows)
    assert normal.images is not None
    images = torch.from_numpy(normal.images).to(window.device)[window]
    kept = token.flatten(0, 1)
    subset = permutation(seed, 1, len(kept), Purpose.SUBSET)[:MAX_TOKENS]
    bank = F.normalize(kept[torch.from_numpy(subset).to(kept.device)], dim=1)
    rows = runtime.ranks.on_main(lambda: coreset_of(bank, share, seed, bench).cpu())
    return F.normalize(mean_of(mean, torch.unique(images, return_inverse=True)[1]), dim=1), bank[rows.to(bank.device)]


def coreset_of(features: Tensor, share: float, seed: int, bench: Bench) -> Tensor:
    """Indices of a share of (N, D) features: each is the farthest from those before it (Roth et al. 2022, section 3.2).

    Distances are those of a random projection to at most `PROJECTED` dimensions.
    """
    count = max(1, round(share * len(features)))
    if count == len(features):
        return torch.arange(count)
    if features.shape[1] > PROJECTED:
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.empty(features.shape[1], PROJECTED).normal_(std=PROJECTED**-0.5, generator=generator)
        features = features @ matrix.to(features.device)
    chosen = torch.zeros(count, dtype=torch.int64, device=features.device)
    nearest = (features - features[0]).square().sum(1)
    squares = features.square().sum(1)
    for number in range(1, count):
        last = nearest.argmax()
        chosen[number] = last
        nearest = torch.minimum(nearest, squares - 2 * (features @ features[last]) + squares[last])
        if number % 500 == 0 or number == count - 1:
            bench.display.preparing("coreset of patches", number + 1, count)
    return chosen


def auroc(scores: Tensor, anomalous: Tensor) -> float:
    """Area under the ROC curve, in [0, 1]; DataError if the images are all normal or all anomalous."""
    if bool(anomalous.all()) or not bool(anomalous.any()):
        kind = "anomalous" if bool(anomalous.any()) else "normal"
        raise DataError(f"all {len(anomalous)} test images are {kind}", "give normal and anomalous ones")
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(anomalous.numpy(), scores.numpy()))
