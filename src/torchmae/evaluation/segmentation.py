"""Segmentation: which class each pixel of a picture is of, by a linear head on patch tokens, or trained end to end.

The linear head is DINOv2's (Oquab et al. 2023, arXiv 2304.07193, section 7.4, "linear"): a linear layer from a patch
token to logits, which are upsampled to pixels. Pictures larger than the model's input are covered by windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from torchmae.config.evaluate import EvaluateOptions
from torchmae.data.loader import Indices
from torchmae.data.sources import evenly_spaced
from torchmae.errors import ConfigError, DataError
from torchmae.evaluation.attentive import Tokens, epochs_for, statistics, train_head
from torchmae.evaluation.bench import Bench, output_folder
from torchmae.evaluation.scores import CONFIDENCE, Result
from torchmae.evaluation.segmentation_data import IGNORED, Pairs, SegmentationData
from torchmae.evaluation.segmentation_finetune import finetuned
from torchmae.evaluation.segmentation_windows import (
    Segment,
    segmented,
    targets,
    training_windows,
    upsample,
    window_batches,
)
from torchmae.evaluation.sharing import share
from torchmae.evaluation.subject import PIXELS, Subject
from torchmae.nn.mae import require_patches
from torchmae.nn.patches import grid_size
from torchmae.random import Purpose, uniform
from torchmae.report.feature_pictures import segmentation_picture
from torchmae.report.pictures import save_png

NAME = "segmentation"
_EPOCHS = 10
_STEPS = 1000
_RESAMPLES = 1000
_PICTURED = 6
_NAMED = 10  # classes whose IoU a note says


class LinearHead(nn.Module):
    """Standardised patch tokens, (B, L, D), to logits of pixels, (B, K, *size).

    Args:
        mean: (D,) of the tokens.
        std: (D,) of the tokens, above 0.
        grid: patches along each axis.
        size: pixels along each axis.
        num_classes: K.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Tensor, std: Tensor, grid: tuple[int, ...], size: tuple[int, ...], num_classes: int
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.grid, self.size = grid, size
        self.head = nn.Linear(len(mean), num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) to (B, K, *size)."""
        logits = self.head((tokens - self.mean) / self.std)
        return upsample(logits.transpose(1, 2).unflatten(2, self.grid), self.size)


def measure(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    """The figures of `figures`, and for what is evaluated a picture of some test pictures and what it makes of them."""
    data = bench.data
    assert isinstance(data, SegmentationData)
    out = output_folder(bench.run, options)
    if subject.model is not None:
        require_patches(subject.model, "to segment by")
    elif options.segmentation.finetune:
        problem = f"segmentation.finetune is given and {bench.run!r} has no network to train"
        raise ConfigError(problem, "evaluate a run, or random with --preset")
    train = finetuned if options.segmentation.finetune else frozen
    segment, name, took, notes = train(bench, data, subject, options)
    classes = data.classes
    counts = count_pixels(bench, data, subject.name, segment)
    result = figures(name, counts, classes, options.seed)
    if subject.name in ("model", bench.run):
        file = out / "pictures" / f"{name}.png"
        bench.runtime.ranks.on_main(lambda: draw(data, segment, bench, file))
        rows = [row for row in result.details[name]["per_class"] if row["iou"] is not None]
        each = ", ".join(f"{row['class']} {row['iou']:.1f}" for row in rows[:_NAMED])
        notes += (f"IoU by class, in percent: {each}", f"{file.name} is in {file.parent}")
    return Result(result.figures | took, result.details, notes)


def left_out(bench: Bench, subject: Subject, options: EvaluateOptions) -> str:
    """A sentence for pixels, which cannot be fine-tuned; else ""."""
    del bench
    return "raw pixels cannot be fine-tuned" if options.segmentation.finetune and subject.name == PIXELS else ""


def frozen(
    bench: Bench, data: SegmentationData, subject: Subject, options: EvaluateOptions
) -> tuple[Segment, str, dict[str, float], tuple[str, ...]]:
    """A linear head on frozen patch tokens, trained; the name of its figures; notes."""
    config, images, runtime = options.segmentation, data.train, bench.runtime
    size, channels = images.model.input_size, len(images.normalisation.mean)
    patch = subject.patch_size if subject.model is None else subject.model.patch_size

    def tokens_of(inputs: Tensor, valid: Tensor | None = None) -> Tensor:
        with runtime.autocast():
            return subject.patch_tokens(inputs, valid)

    one = tokens_of(torch.zeros(1, channels, *size, device=runtime.device))
    windows, notes = training_windows(images, 2 * one.numel() + math.prod(size), config.memory_limit)
    mine = share(np.arange(len(windows)), images.model.batch_size, runtime.ranks)
    tokens, labels, done = [], [], 0
    for inputs, valid, wanted in window_batches(images, data.maps, [windows[row] for row in mine.rows]):
        valid = None if valid is None else valid.to(runtime.device)
        tokens.append(tokens_of(inputs.to(runtime.device), valid).half().cpu())
        labels.append(wanted)
        done += len(inputs)
        bench.display.preparing(f"encoding training windows, {subject.name}", done, len(mine.rows))
    every_token, every_label = mine.of_all_images(tokens, labels)
    held = held_windows(every_token, every_label, runtime.device)
    head = LinearHead(*statistics(held, images.model.batch_size), grid_size(size, patch), size, len(data.classes))
    head.to(runtime.device)
    epochs = config.epochs or epochs_for(held.count, config.batch_size, _EPOCHS, _STEPS)
    for epoch in train_head(head, held, epochs, config, options.seed):
        bench.display.preparing(f"linear head on patches, {subject.name}, epochs", epoch, epochs)
    return lambda inputs, valid: head(tokens_of(inputs, valid).half().float()), NAME, {}, notes


def held_windows(tokens: Tensor, labels: Tensor, device: torch.device) -> Tokens:
    """Tokens in memory, (N, L, D) float16, and classes, (N, h, w) uint8, of the windows where any pixel counts."""
    known = torch.from_numpy(np.flatnonzero((labels != IGNORED).flatten(1).any(1).numpy()))

    def batches(indices: Indices, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.split(known[torch.from_numpy(indices)], size):
            yield tokens[rows].to(device).float(), targets(labels[rows].to(device))

    return Tokens(len(known), batches)


# Figures.


def count_pixels(bench: Bench, data: SegmentationData, name: str, segment: Segment) -> npt.NDArray[np.int64]:
    """Of each test picture and class how many pixels were right, are of it, and were taken for it: (N, 3, K).

    Of several ranks, each looks at a share of the pictures.
    """
    images, pairs, runtime = data.test, data.test.source, bench.runtime
    assert isinstance(pairs, Pairs)
    mine, rows = share(np.arange(len(pairs)), 1, runtime.ranks), []
    for number, index in enumerate(mine.rows.tolist(), 1):
        counts = np.zeros((3, len(data.classes)), dtype=np.int64)
        guess = segmented(images, index, pairs.sizes[index], segment, runtime.device)
        if guess is not None:
            truth = data.maps.read(pairs.files[index])
            counted = (truth != IGNORED) & (guess != IGNORED)
            truth, guess = truth[counted], guess[counted]
            for row, values in enumerate((truth[truth == guess], truth, guess)):
                counts[row] = np.bincount(values, minlength=len(data.classes))
        rows.append(torch.from_numpy(counts)[None].to(runtime.device))
        bench.display.preparing(f"segmenting test pictures, {name}", number, len(mine.rows))
    return mine.of_all_images(rows)[0].cpu().numpy()


def iou_of(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Intersection over union, (..., K), from counts (..., 3, K); NaN for classes that nothing has."""
    hit, truth, guess = np.moveaxis(counts, -2, 0)
    union = truth + guess - hit
    return np.divide(hit, union, out=np.full(union.shape, np.nan), where=union > 0)


def figures(name: str, counts: npt.NDArray[np.int64], classes: Sequence[str], seed: int) -> Result:
    """How well pixels were classified.

    Args:
        name: of the figures.
        counts: as of `count_pixels`.
        classes: the name of each class.
        seed: of the bootstrap.

    Returns:
        figures, in percent: NAME_miou, the mean of the classes' intersection over union, over all pixels of all
        pictures; NAME_miou_low and _high, its 95% interval by bootstrap over pictures (not for a single one);
        NAME_foreground, the second class's own, of two; NAME_accuracy, the share of pixels that are right. Classes
        that neither truth nor guesses have are left out of the mean. details, under NAME: of each class its pixels and
        its IoU.

    Raises:
        DataError: no pixel counts.
    """
    total = counts.sum(0).astype(np.float64)
    if not total[1].any():
        raise DataError("no pixel of the test masks counts", "give masks with other pixels than segmentation.ignore")
    iou = 100 * iou_of(total)
    found = {f"{name}_miou": float(np.nanmean(iou)), f"{name}_accuracy": float(100 * total[0].sum() / total[1].sum())}
    if len(classes) == 2 and np.isfinite(iou[1]):
        found[f"{name}_foreground"] = float(iou[1])
    pictures = counts[counts[:, 1].any(1)]
    if len(pictures) > 1:
        drawn = uniform(seed, 0, np.arange(_RESAMPLES), Purpose.BOOTSTRAP, len(pictures)) * len(pictures)
        times = np.stack([np.bincount(row, minlength=len(pictures)) for row in drawn.astype(np.int64)])
        means = 100 * np.nanmean(iou_of(np.tensordot(times, pictures, 1).astype(np.float64)), axis=-1)
        ends = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        found |= {f"{name}_miou_low": float(ends[0]), f"{name}_miou_high": float(ends[1])}
    per_class = [
        {"class": word, "pixels": int(pixels), "iou": None if np.isnan(value) else float(value)}
        for word, pixels, value in zip(classes, total[1], iou, strict=True)
    ]
    return Result(found, {name: {"per_class": per_class}})


def draw(data: SegmentationData, segment: Segment, bench: Bench, file: Path) -> None:
    """Saves a picture of some test pictures, their masks and guesses; CheckpointError where it cannot be saved."""
    images, pairs = data.test, data.test.source
    assert isinstance(pairs, Pairs)
    shown = []
    for index in evenly_spaced(len(pairs), _PICTURED).tolist():
        guess = segmented(images, index, pairs.sizes[index], segment, bench.runtime.device)
        if guess is not None:
            stored, valid = pairs.read_valid(index)
            values = images.normalisation.apply(torch.from_numpy(stored).movedim(-1, 0)[None])
            where = None if valid is None else torch.from_numpy(valid)[None, None]
            picture = images.normalisation.shown(values, where)[0].numpy()
            shown.append((picture, data.maps.read(pairs.files[index]), guess))
    pictures, truth, guesses = zip(*shown, strict=True)
    save_png(segmentation_picture(pictures, truth, guesses, data.classes), file)
