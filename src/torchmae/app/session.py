"""What the page computes: reconstructions under painted masks, patch features and attention, nearest neighbours.

This file does not depend on a browser. Several requests may come at once, each on its own thread.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from torchmae.config.visualize import AppOptions
from torchmae.data.formats import open_item
from torchmae.data.items import Valid, check_pixels
from torchmae.data.loader import ImageLoader
from torchmae.data.opening import Data
from torchmae.errors import ConfigError, DataError, TorchmaeError
from torchmae.evaluation.embedding import Features, read_features
from torchmae.evaluation.feature_maps import class_attention, content_tokens, patch_colours
from torchmae.evaluation.inpainting import interpolate
from torchmae.evaluation.knn import nearest
from torchmae.evaluation.subject import Subject
from torchmae.nn.mae import require_patches
from torchmae.nn.masking import Mask, mask_from_pixels, mask_from_tokens
from torchmae.nn.patches import patchify
from torchmae.training.pretrained import Prepared, Pretrained, load
from torchmae.training.runtime import open_runtime
from torchmae.visualize import held_out, look_of, name_of, open_run_data, sample

FloatArray: TypeAlias = npt.NDArray[np.float32]
Picture: TypeAlias = tuple[Prepared, ...]
"""One image, prepared for each run, on the device."""

MAX_RUNS = 2
NUM_EXAMPLES = 12
NUM_NEIGHBOURS = 8


class Filled(NamedTuple):
    """One model's reconstruction of a picture; images are laid out (`laid_out`), in [0, 1]."""

    name: str  # of the run
    original: FloatArray
    reconstructed: FloatArray  # visible patches unchanged, masked ones as predicted
    error: FloatArray  # (rows, columns), root mean squared error of each masked patch; NaN where a patch is visible
    masked: float  # share of the patches, in (0, 1)
    mse: float  # over the masked pixels
    mse_interpolation: float  # the same for smooth interpolation from the visible pixels
    norm_pix: bool  # the true mean and contrast of each patch were put back


class Seen(NamedTuple):
    """One model's features of a whole picture."""

    name: str  # of the run
    original: FloatArray  # laid out, in [0, 1]
    colours: FloatArray  # (rows, columns, 3) in [0, 1], `feature_maps.patch_colours`
    attention: FloatArray | None  # (heads, rows, columns), `feature_maps.class_attention`; None without a class token


class Neighbour(NamedTuple):
    """An image of the embedded data set."""

    name: str  # its path, or its place in the data set
    label: str  # its class; "" if unknown
    cosine: float  # similarity of its features to the picture's
    image: FloatArray | None  # laid out, in [0, 1]; None: it cannot be read


class Session:
    """The models of a page and what they compute for it.

    `runs` are one or two pairs of a name and a model, on the device, in eval mode. `data` is the first run's data set,
    for examples and for the pictures of neighbours. `bank` is the embedded data set, among which neighbours are found.
    `show` names the channels that are drawn.

    Raises:
        ConfigError: a model without patches, two models for different images, or features of another model.
        DataError: `bank` is empty.
    """

    def __init__(
        self,
        runs: Sequence[tuple[str, Pretrained]],
        device: torch.device,
        data: Data | None = None,
        bank: Features | None = None,
        show: Sequence[int | str] = (),
    ) -> None:
        self.runs = tuple(runs)
        self.names = tuple(name for name, _ in runs)
        self.first = runs[0][1]
        self.bank = bank
        self._device = device
        self._data = data
        self._busy = threading.Lock()  # `class_attention` hooks into the model: one call at a time
        for name, pretrained in runs:
            require_patches(pretrained.model, f"to look at ({name})")
        self.kind = self.first.description.kind
        self._look = look_of(self.first.description, show)
        places = np.arange(self.first.model.encoder.num_patches).reshape(self.first.model.encoder.grid)
        self._places = torch.from_numpy(
            side_by_side(places).flatten()
        )  # of the patches on the page, in the model's order
        check_same_images(runs[0], runs[-1])
        if bank is not None:
            check_bank(bank, self.first)
            self._features = torch.from_numpy(bank.features).to(device)
        self._samples: Prepared | None = None
        self.examples: tuple[FloatArray, ...] = ()
        if data is not None:
            self._samples = sample(held_out(data), NUM_EXAMPLES, None)
            count = len(self._samples.names)
            self.examples = tuple(self.laid_out(self.first, self._samples.part(slice(i, i + 1))) for i in range(count))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the first run's patches, as they are laid out."""
        *deep, columns = self.first.model.encoder.grid
        return deep[-1] if deep else 1, columns * (deep[0] if len(deep) == 2 else 1)

    def laid_out(self, pretrained: Pretrained, images: Prepared, values: Tensor | None = None) -> FloatArray:
        """One image, or `values` in its place, in [0, 1]: (C, H, W), the middles of a volume's patches side by side.

        Signals stay (C, L).
        """
        shown = pretrained.description.normalisation.shown(images.images if values is None else values, images.valid)
        array = shown[0, list(self._look.channels) or slice(None)].numpy()
        if array.ndim == 4:
            depth = pretrained.model.patch_size[0]
            array = np.stack([side_by_side(channel[depth // 2 :: depth]) for channel in array])
        return array

    def open(self, path: Path) -> Picture:
        """Opens a file that a user chose: an image, or a .npy array (*size, channels).

        DataError: no image, damaged, or too many pixels. ConfigError: an array of the wrong type or number of channels.
        """
        context = self.first.context
        item = open_item(path, context, lambda: path.name)
        check_pixels(item.size, context)
        return self._picture(*item.read_valid())

    def example(self, index: int) -> Picture:
        """One of `examples`."""
        if not 0 <= index < len(self.examples):
            raise DataError(f"there is no example {index}", f"there are {len(self.examples)}")
        assert self._samples is not None
        chosen, normalisation = self._samples.part(slice(index, index + 1)), self.first.description.normalisation
        stored = replace(normalisation, low=None, high=None).shown(chosen.images)[0] * normalisation.one(torch.float32)
        valid = None if chosen.valid is None else chosen.valid[0, 0].cpu().numpy()
        return self._picture(np.moveaxis(stored.numpy(), 0, -1), valid)

    def draw_mask(self, strategy: str, ratio: float, seed: int) -> tuple[int, ...]:
        """Draws a mask and returns the sorted places of the masked patches. Arguments as for `Pretrained.mask`."""
        mask = self.first.mask(1, strategy=strategy, ratio=ratio, seed=seed)
        return tuple(torch.isin(self._places, mask.ids_masked[0]).nonzero().flatten().tolist())

    def original(self, picture: Picture) -> FloatArray:
        """The picture as the first run takes it, laid out."""
        return self.laid_out(self.first, picture[0])

    def fill(self, picture: Picture, masked: Sequence[int]) -> list[Filled]:
        """Each model's reconstruction of a picture; ConfigError: no patch is masked, or all are.

        `masked` are places in `grid`. A patch of another run is masked if it overlaps one of these.
        """
        flags = torch.zeros(math.prod(self.grid), dtype=torch.bool)
        if any(not 0 <= index < len(flags) for index in masked):
            raise ConfigError("a patch outside the image is masked", f"number patches from 0 to {len(flags) - 1}")
        flags[self._places[list(masked)]] = True
        mask = mask_from_tokens(flags)
        removed = mask.removed_pixels(self.first.model.patch_size, self.first.model.encoder.input_size)
        return [
            self._fill(name, run, images, mask if run is self.first else _same_mask(removed, name, run))
            for (name, run), images in zip(self.runs, picture, strict=True)
        ]

    def look(self, picture: Picture) -> list[Seen]:
        """Each model's features of the whole picture."""
        return [self._see(name, run, images) for (name, run), images in zip(self.runs, picture, strict=True)]

    def neighbours(self, picture: Picture, count: int = NUM_NEIGHBOURS) -> list[Neighbour]:
        """The images of the embedded data set whose features are nearest to the picture's, nearest first."""
        assert self.bank is not None
        with self._busy:
            shown, about = picture[0], self.bank.about
            query = self.first.encode(shown.images, about.get("pool", "mean"), shown.valid, self.bank.layer).float()
        found, cosines = (item[0].tolist() for item in nearest(self._features, query, count))
        classes = self.first.description.classes
        names, labels = self.bank.paths[found].tolist(), self.bank.labels[found].tolist()
        return [
            Neighbour(name, name_of(label, classes), cosine, self._image_of(name))
            for name, label, cosine in zip(names, labels, cosines, strict=True)
        ]

    def _picture(self, image: npt.NDArray[Any], valid: Valid | None = None) -> Picture:
        prepared = (run.prepared(image, valid) for _, run in self.runs)
        return tuple(
            Prepared(images, None if bool(kept.all()) else kept, ("",)).to(self._device) for images, kept in prepared
        )

    def _fill(self, name: str, pretrained: Pretrained, picture: Prepared, mask: Mask) -> Filled:
        images, model, mask = picture.images, pretrained.model, mask.to(picture.images.device)
        if picture.valid is not None:
            mask = mask._replace(valid=patchify(picture.valid, model.patch_size))
        with self._busy:
            result = pretrained.reconstruct(images, mask)
        original, filled, interpolated = (
            pretrained.description.normalisation.shown(item)[0]
            for item in (images, result.images, interpolate(images, result.removed))
        )
        pixels = mask._replace(valid=None).removed_pixels(model.patch_size, images.shape[2:])
        pixels = (pixels if picture.valid is None else pixels & picture.valid)[0].cpu().expand_as(original)
        error = patchify((filled - original)[None], model.patch_size).square().mean(-1).sqrt()[0]
        flags = mask.removed()[0].cpu()
        return Filled(
            name=name,
            original=self.laid_out(pretrained, picture),
            reconstructed=self.laid_out(pretrained, picture, result.images),
            error=side_by_side(error.masked_fill(~flags, torch.nan).view(model.encoder.grid).numpy()),
            masked=float(flags.float().mean()),
            mse=float((filled - original).square()[pixels].mean()),
            mse_interpolation=float((interpolated - original).square()[pixels].mean()),
            norm_pix=model.target.norm_pix,
        )

    def _see(self, name: str, pretrained: Pretrained, picture: Prepared) -> Seen:
        model, images = pretrained.model, picture[:2]
        grid = model.encoder.grid
        with self._busy:
            colours = side_by_side(patch_colours(content_tokens(model, *images)).reshape(*grid, 3), 1)
            heads = class_attention(model, *images)[0] if model.encoder.has_class_token else None
        maps = None if heads is None else np.stack([side_by_side(head.reshape(grid)) for head in heads])
        return Seen(name, self.laid_out(pretrained, picture), colours, maps)

    def _image_of(self, name: str) -> FloatArray | None:
        """An image by the name that `torchmae embed` gave it; None: it cannot be read."""
        try:
            if Path(name).is_file():
                return self.laid_out(self.first, self.first.prepare(name, limit=1))
            if name not in self._rows:
                return None
            loader, index = self._rows[name]
            batch = next(iter(loader.eval_batches(np.array([index]), 1)))
            return self.laid_out(self.first, Prepared(batch.images, batch.valid, (name,)))
        except (DataError, ConfigError, OSError):
            return None

    @cached_property
    def _rows(self) -> dict[str, tuple[ImageLoader, int]]:
        """Loader and index of each image of the data, by its name."""
        loaders = () if self._data is None else (self._data.train, self._data.val)
        return {
            loader.source.name(i): (loader, i) for loader in loaders if loader is not None for i in range(len(loader))
        }


def open_session(options: AppOptions, say: Callable[[str], None]) -> Session:
    """Loads the models, the features and the examples of a page; `say` gets notes about them, a line each.

    TorchmaeError: a model, features or named data that cannot be used.
    """
    if len(options.runs) > MAX_RUNS:
        raise ConfigError(f"{len(options.runs)} runs are given", "the page compares two; `torchmae report` takes more")
    runtime = open_runtime(options.device, "fp32", None)
    loaded = [(str(run), load(run, target=options.target)) for run in options.runs]
    for name, pretrained in loaded:
        pretrained.model.to(runtime.device)
        for note in pretrained.notes:
            say(f"{name}: {note}")
    bank = None if options.features is None else read_features(options.features)
    source, root = options.data.source, options.data.root
    try:
        data = open_run_data(options.runs[0], loaded[0][1], runtime, source, root)
    except TorchmaeError as error:
        if source is not None:
            raise
        say(f"no example images: {error.problem}")
        data = None
    return Session(loaded, runtime.device, data, bank, options.show)


def side_by_side(values: npt.NDArray[Any], extra: int = 0) -> npt.NDArray[Any]:
    """(depth, rows, columns) as (rows, depth * columns); (columns,) as one row; `extra` axes follow."""
    axes = values.ndim - extra
    if axes == 3:
        return values.swapaxes(0, 1).reshape(values.shape[1], -1, *values.shape[3:])
    return values if axes == 2 else values[None]


def check_same_images(first: tuple[str, Pretrained], second: tuple[str, Pretrained]) -> None:
    """Raises ConfigError unless both models take the same crop of the same images."""
    (name, a), (other, b) = ((name, run.description.arguments) for name, run in (first, second))
    sizes = a["input_size"], b["input_size"]
    same = len(sizes[0]) == len(sizes[1]) and len({Fraction(*sides) for sides in zip(*sizes, strict=True)}) == 1
    if a["in_chans"] != b["in_chans"] or not same:
        one, two = ("x".join(map(str, size)) for size in sizes)
        raise ConfigError(
            f"{name} takes images of {one} pixels and {a['in_chans']} channels, {other} of {two} and {b['in_chans']}",
            "compare runs with the same channels and proportions",
        )


def check_bank(bank: Features, pretrained: Pretrained) -> None:
    """Raises ConfigError unless the features are the model's, and DataError if there are none."""
    fix = "embed the images with this run"
    model, features, pool = pretrained.model, bank.features, bank.about.get("pool", "mean")
    if features.ndim != 2:
        raise ConfigError(
            f"the file holds features of every patch, shape {features.shape}", "embed the images with --pool mean"
        )
    if not len(features):
        raise DataError("the file of features holds no images", "embed some with torchmae embed")
    if pool not in model.pools:
        raise ConfigError(f"pool is {pool!r} but the model has no class token", fix)
    if bank.about.get("weights") not in (None, Subject("model", model).fingerprint()):
        raise ConfigError("the features are those of another model", fix)
    expected = model.encoder.embed_dim * (2 if pool == "both" else 1) * len(bank.layer or [0])
    if features.shape[1] != expected:
        raise ConfigError(f"the features have {features.shape[1]} values an image and this model gives {expected}", fix)


def _same_mask(removed: Tensor, name: str, pretrained: Pretrained) -> Mask:
    """Converts the first run's mask, (1, 1, *size) bool, to the patches of another run, whose input size may differ."""
    size = pretrained.description.input_size
    resized = F.interpolate(removed.float(), size=size, mode="nearest")[:, 0] > 0
    try:
        return mask_from_pixels(resized, pretrained.model.patch_size)
    except ConfigError as error:
        raise ConfigError(f"{name}, whose patches are larger: {error.problem}", "mask less, or a block") from error
