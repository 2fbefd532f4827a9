"""Pictures of what a trained model learned: computed by `evaluation.feature_maps`, drawn by `report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from torchmae.data.loader import ImageLoader, mixed_subset
from torchmae.data.opening import Data, open_data
from torchmae.data.transforms import Normalisation
from torchmae.errors import ConfigError
from torchmae.evaluation.diagnostics import Seen, encoding_time
from torchmae.evaluation.feature_maps import SHIFTS, class_attention, content_tokens, embed_2d, patch_colours
from torchmae.evaluation.images import EVAL_BATCH, run_data
from torchmae.evaluation.knn import nearest
from torchmae.evaluation.quality import strategies_of
from torchmae.evaluation.subject import Subject, extract
from torchmae.nn.mae import Reconstruction
from torchmae.report.feature_pictures import (
    attention_picture,
    class_name,
    map_picture,
    neighbours_picture,
    pca_picture,
    ratios_picture,
)
from torchmae.report.panels import FloatArray, Look
from torchmae.report.pictures import save_png
from torchmae.training.pretrained import Prepared, Pretrained
from torchmae.training.progress import Display
from torchmae.training.runtime import Runtime
from torchmae.training.saved_model import Description

RATIOS = (0.25, 0.5, 0.75, 0.9)
NEIGHBOURS = 7
METHOD_NAMES = {"tsne": "t-SNE", "pca": "the first two principal components", "umap": "UMAP"}
# Numbers of images in a run's report: shown as colours, in other rows, searched for neighbours, on the map. Drawing
# takes seconds on a CPU.
REPORT_IMAGES = 8
REPORT_ROWS = 4
REPORT_BANK = 1000
REPORT_POINTS = 1000
_FEWEST = 100  # images searched for neighbours, and on the map, of a slow model
_MOST_S = 60.0  # seconds that encoding them may take
_NOTICED_S = 2.0  # seconds from which on it is said


def write_pictures(
    folder: Path,
    pretrained: Pretrained,
    data: Data,
    runtime: Runtime,
    display: Display | None = None,
    seen: Mapping[str, Seen] | None = None,
) -> list[Path]:
    """Draws every kind of picture that suits model and data, for a run's report; returns the files in its order.

    The images are held-out ones, the same in every run on the same data; neighbours are training images. Here and in
    the functions below, the model is on the runtime's device. A slow model encodes fewer images: those of a minute.
    Features of "train" and "val" in `seen` are not computed again.

    Raises:
        CheckpointError: the folder cannot be written to.
        DataError: images that are no longer readable.
    """
    loader = held_out(data)
    images = sample(loader, REPORT_IMAGES, data.classes)
    few = images.part(slice(REPORT_ROWS))
    model, look = pretrained.model, look_of(pretrained.description)
    image_s = encoding_time(model, loader, runtime)
    num_images = min(REPORT_BANK, max(_FEWEST, int(_MOST_S / 2 / image_s)))
    seen = seen or {}
    count = (2 - len(seen)) * num_images + SHIFTS * len(images.images)
    if display is not None and count * image_s > _NOTICED_S:
        display.say("drawing pictures of the features")
    pictures: dict[str, Image.Image] = {}
    if model.patch_size:
        pictures["1-features"] = draw_pca(pretrained, images, look)
        if model.encoder.has_class_token:
            pictures["2-attention"] = draw_attention(pretrained, few, look)
    pictures["3-neighbours"] = draw_neighbours(pretrained, few, look, data, runtime, num_images, seen.get("train"))
    if len(loader) > NEIGHBOURS:  # a map needs more points
        pictures["4-map"] = draw_map(pretrained, data, runtime, min(REPORT_POINTS, num_images), seen=seen.get("val"))
    pictures["5-ratios"] = draw_ratios(pretrained, few, look)
    paths = [folder / f"{name}.png" for name in pictures]
    for path, picture in zip(paths, pictures.values(), strict=True):
        save_png(picture, path)
    return paths


def look_of(description: Description, show: Sequence[int | str] = ()) -> Look:
    """How the samples of a model are drawn; `show` names the channels. ConfigError: channels that it does not have."""
    return Look.of(description.kind, description.arguments["in_chans"], description.bands or (), show)


def draw_pca(pretrained: Pretrained, images: Prepared, look: Look) -> Image.Image:
    """Images of `Pretrained.prepare` beside their patch features as colours; ConfigError without patches."""
    colours = patch_colours(content_tokens(pretrained.model, images.images, images.valid))
    encoder = pretrained.model.encoder
    maps = look.spread(colours, encoder.grid, encoder.input_size)
    return pca_picture(_to_show(pretrained, images, look), maps, look.kind)


def draw_attention(pretrained: Pretrained, images: Prepared, look: Look) -> Image.Image:
    """Images, as for `draw_pca`, beside the class token's attention; ConfigError without a class token."""
    attention = class_attention(pretrained.model, images.images, images.valid)
    encoder = pretrained.model.encoder
    maps = look.spread(attention.swapaxes(1, 2), encoder.grid, encoder.input_size)
    return attention_picture(_to_show(pretrained, images, look), np.moveaxis(maps, -1, 1), look.kind)


def draw_ratios(
    pretrained: Pretrained, images: Prepared, look: Look, ratios: Sequence[float] = RATIOS, seed: int = 0
) -> Image.Image:
    """Images, as for `draw_pca`, and their reconstructions at several mask ratios.

    Random masks of one seed are nested: a higher ratio masks the same patches and more.
    """
    known = strategies_of(pretrained.model)
    trained = pretrained.description.mask["strategy"]
    strategy = trained if trained in known else known[0]
    masked, filled, note = [], [], ""
    for ratio in ratios:
        mask = pretrained.mask(len(images.images), strategy=strategy, ratio=ratio, seed=seed, valid=images.valid)
        result = pretrained.reconstruct(images.images, mask.to(images.images.device))
        before, after, _ = triplet(pretrained.description.normalisation, images, result, look)
        masked.append(before)
        filled.append(after)
        note = result.note
    return ratios_picture(_to_show(pretrained, images, look), masked, filled, ratios, note, look.kind)


def triplet(
    normalisation: Normalisation, images: Prepared, result: Reconstruction, look: Look
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Masked, reconstructed and original images, laid out for pictures."""
    original, filled = (normalisation.shown(item, images.valid) for item in (images.images, result.images))
    masked = original.masked_fill(result.removed.cpu() & ~original.isinf(), torch.nan)
    return look.flat(masked), look.flat(filled), look.flat(original)


def draw_neighbours(
    pretrained: Pretrained,
    images: Prepared,
    look: Look,
    data: Data,
    runtime: Runtime,
    num_images: int,
    seen: Seen | None = None,
) -> Image.Image:
    """Images, as for `draw_pca`, beside the nearest of `num_images` training images or of those `seen`."""
    features, labels, bank = seen or _features(pretrained, data.train, num_images, runtime)
    queries = pretrained.encode(images.images, valid=images.valid)
    found, cosines = (item.cpu() for item in nearest(features, queries, NEIGHBOURS))
    batches = data.train.eval_batches(bank[found.flatten().numpy()], EVAL_BATCH)
    shown = pretrained.description.normalisation.shown
    flat = look.flat(torch.cat([shown(batch.images, batch.valid) for batch in batches]))
    neighbours = flat.reshape(*found.shape, *flat.shape[1:])
    lines = [
        [f"{cosine:.2f} {name_of(label, data.classes)}".rstrip() for cosine, label in zip(row, names, strict=True)]
        for row, names in zip(cosines.tolist(), labels.cpu()[found].tolist(), strict=True)
    ]
    return neighbours_picture(_to_show(pretrained, images, look), neighbours, lines, images.names, look.kind)


def draw_map(
    pretrained: Pretrained,
    data: Data,
    runtime: Runtime,
    num_images: int,
    method: str = "tsne",
    seed: int = 0,
    seen: Seen | None = None,
) -> Image.Image:
    """A map of `num_images` held-out images, or those `seen`, by `embed_2d`, with its method, seed and errors."""
    features, labels, _ = seen or _features(pretrained, held_out(data), num_images, runtime)
    points = embed_2d(features, method, seed)
    kind = pretrained.description.kind
    return map_picture(points, labels.cpu().numpy(), data.classes, METHOD_NAMES[method], kind)


def open_run_data(run: Path, pretrained: Pretrained, runtime: Runtime, source: str | None, root: str | None) -> Data:
    """The run's data set, or the data of `source` and `root` as for `torchmae pretrain`, read as in training.

    Raises:
        ConfigError: no source, and the folder does not name the data of training.
        DataError: data that is missing or cannot be used.
    """
    own = run_data(str(run))
    if source is None and not own.source:
        raise ConfigError(f"{run} does not say what the model was trained on", "name the images: --data PATH_OR_NAME")
    # Other data need not have the split or path of the run's held-out images, nor its groups.
    chosen_data = own if source is None else replace(own, source=source, val="auto", group=None)
    description = pretrained.description
    config = replace(
        chosen_data,
        root=own.root if root is None else root,
        normalise="dataset",  # with these two nothing is measured; the model's own way follows
        mean=description.mean,
        std=description.std,
        cache="none",  # only a few images are read
    )
    channels, way = description.arguments["in_chans"], description.normalisation
    data = open_data(config, input_size=description.input_size, channels=channels, device=runtime.device)
    val = None if data.val is None else replace(data.val, normalisation=way)
    return replace(data, train=replace(data.train, normalisation=way), val=val, normalisation=way)


def held_out(data: Data) -> ImageLoader:
    """The held-out images, or the training images if there are none."""
    return data.train if data.val is None else data.val


def sample(loader: ImageLoader, count: int, classes: Sequence[str] | None) -> Prepared:
    """A fixed choice of images (at most `count`), named by their classes, on the loader's device."""
    (batch,) = loader.eval_batches(mixed_subset(len(loader), count), count)
    return Prepared(batch.images, batch.valid, tuple(name_of(label, classes) for label in batch.labels.tolist()))


def name_of(label: int, classes: Sequence[str] | None) -> str:
    """`class_name` of a label; empty for -1."""
    return "" if label < 0 else class_name(label, classes)


def _features(pretrained: Pretrained, loader: ImageLoader, num_images: int, runtime: Runtime) -> Seen:
    """Of at most `num_images` images."""
    rows = mixed_subset(len(loader), num_images)
    found = extract(Subject("model", pretrained.model), loader.eval_batches(rows, EVAL_BATCH), runtime)
    return Seen(*found, rows)


def _to_show(pretrained: Pretrained, images: Prepared, look: Look) -> FloatArray:
    return look.flat(pretrained.description.normalisation.shown(images.images, images.valid))
