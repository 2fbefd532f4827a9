"""What the page shows, without the page: pictures, holes, what models fill in, what they see, neighbours.

Nothing here knows of a browser. Several requests may come at once, each on a thread of its own.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from torchmae.data.formats import check_pixels, open_item
from torchmae.data.loader import ImageLoader
from torchmae.data.opening import Data
from torchmae.data.sources import MAX_BYTES, check_size
from torchmae.errors import ConfigError, DataError, TorchmaeError
from torchmae.evaluation.embedding import read_features
from torchmae.evaluation.feature_maps import (
    class_attention,
    content_tokens,
    nearest,
    patch_colours,
)
from torchmae.evaluation.inpainting import interpolate
from torchmae.evaluation.subject import Subject
from torchmae.nn.mae import require_patches
from torchmae.nn.masking import Mask, mask_from_pixels, mask_from_tokens
from torchmae.nn.patches import patchify
from torchmae.training.pretrained import Pretrained, load
from torchmae.training.runtime import open_runtime
from torchmae.visualize import held_out, name_of, open_run_data, sample

FloatArray = npt.NDArray[np.float32]

MAX_RUNS = 2
NUM_EXAMPLES = 12
NUM_NEIGHBOURS = 8
_SMALLEST_ERROR = 1e-10  # a PSNR of 100 dB stands for infinity


@dataclass(frozen=True)
class Picture:
    """One image as each of the models takes it.

    Attributes:
        images: (1, C, *size) for each run, on the device, normalised as in its training.
    """

    images: tuple[Tensor, ...]


@dataclass(frozen=True)
class Errors:
    """How far a guess is from the truth, over the hidden pixels, of values in [0, 1].

    Attributes:
        mse: mean squared error.
        psnr: the same in decibels, 100 at most.
    """

    mse: float
    psnr: float


@dataclass(frozen=True)
class Filled:
    """What one model makes of a picture with a hole.

    Attributes:
        name: of the run.
        original: (C, H, W) in [0, 1].
        reconstructed: likewise: what is visible as it was, the rest as predicted.
        error: (rows, columns), root mean squared error of each patch; NaN where it is visible.
        hidden: share of the patches that were hidden, in (0, 1).
        model: its errors.
        interpolation: those of smooth interpolation from the visible pixels, which takes no learning.
        norm_pix: whether the true mean and contrast of each patch were put back.
    """

    name: str
    original: FloatArray
    reconstructed: FloatArray
    error: FloatArray
    hidden: float
    model: Errors
    interpolation: Errors
    norm_pix: bool


@dataclass(frozen=True)
class Seen:
    """What one model sees in a whole picture.

    Attributes:
        name: of the run.
        original: (C, H, W) in [0, 1].
        colours: (rows, columns, 3) in [0, 1], `feature_maps.patch_colours`.
        attention: (heads, rows, columns), `feature_maps.class_attention`; None without a class token.
    """

    name: str
    original: FloatArray
    colours: FloatArray
    attention: FloatArray | None


@dataclass(frozen=True)
class Neighbour:
    """An image of the embedded data set.

    Attributes:
        name: where it is from.
        label: in words; empty where unknown.
        cosine: how much its features are like the picture's.
        image: (C, H, W) in [0, 1]; None where the image cannot be had any more.
    """

    name: str
    label: str
    cosine: float
    image: FloatArray | None


@dataclass(frozen=True)
class Bank:
    """Features of a data set, as `torchmae embed` wrote them.

    Attributes:
        features: (N, D) float32 on the device.
        labels: (N,) -1 where unknown.
        names: (N,) where each image is from.
        pool: how they were pooled.
        weights: digest of the model's; None: unknown.
    """

    features: Tensor
    labels: npt.NDArray[np.int64]
    names: npt.NDArray[np.str_]
    pool: str
    weights: str | None = None


class Session:
    """The models of a page and all that it asks of them.

    Args:
        runs: a name and a model for each run, one or two; on the device, in eval mode.
        device: where to compute.
        data: the first run's data set, for examples and for pictures of neighbours; None: there is none.
        bank: the embedded data set; None: there is none.

    Raises:
        ConfigError: a model that is not of images with patches, two that cannot be given the same image, or features
            that the first model did not make.
    """

    def __init__(
        self,
        runs: Sequence[tuple[str, Pretrained]],
        device: torch.device,
        data: Data | None = None,
        bank: Bank | None = None,
    ) -> None:
        self.names = tuple(name for name, _ in runs)
        self.models = tuple(model for _, model in runs)
        self._device = device
        self._data = data
        self._bank = bank
        self._busy = threading.Lock()  # attention is caught by a hook on the model, which must serve one call at a time
        for name, pretrained in runs:
            check_model(name, pretrained)
        if len(runs) > 1:
            check_same_images(*runs[:2])
        if bank is not None:
            check_bank(bank, self.models[0])
        self.examples = self._examples()

    @property
    def channels(self) -> int:
        """Of every image."""
        return int(self.models[0].description.arguments["in_chans"])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the first run's input, in pixels."""
        height, width = self.models[0].description.input_size
        return height, width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the first run's patches."""
        rows, columns = self.models[0].model.encoder.grid
        return rows, columns

    @property
    def has_bank(self) -> bool:
        """Whether there are features to look for neighbours among."""
        return self._bank is not None

    @property
    def strategies(self) -> tuple[str, float]:
        """The mask strategy and ratio that the first run was trained with."""
        mask = self.models[0].description.mask
        return str(mask["strategy"]), float(mask["ratio"])

    def open(self, path: Path) -> Picture:
        """A picture from a file that a user chose: an image, or a .npy array (height, width, channels).

        Raises:
            DataError: no image, one that is damaged or has too many pixels.
            ConfigError: an array of another type or number of channels than the models take.
        """
        context = self.models[0].context
        with path.open("rb") as file:
            item = open_item(check_size(file.read(MAX_BYTES + 1)), context, lambda: path.name)
        check_pixels(item.size, context)
        return self._picture(item.read())

    def example(self, index: int) -> Picture:
        """One of `examples`."""
        if not 0 <= index < len(self.examples):
            raise DataError(f"there is no example {index}", f"there are {len(self.examples)}")
        return self._picture(np.moveaxis(self.examples[index], 0, -1))

    def draw_hole(self, strategy: str, ratio: float, seed: int) -> tuple[int, ...]:
        """Indices of the patches that a drawn mask hides, rising. Arguments as for `Pretrained.mask`."""
        mask = self.models[0].mask(1, strategy=strategy, ratio=ratio, seed=seed)
        return tuple(sorted(mask.ids_masked[0].tolist()))

    def original(self, picture: Picture) -> FloatArray:
        """(C, H, W) in [0, 1]: the picture as the first run takes it."""
        return _to_show(self.models[0], picture.images[0])

    def fill(self, picture: Picture, hidden: Sequence[int]) -> list[Filled]:
        """What each model makes of a picture.

        Args:
            picture: the picture.
            hidden: patches of the first run's grid. Another run's patches are hidden where they touch one of these.

        Raises:
            ConfigError: no patch is hidden, or all are.
        """
        flags = torch.zeros(math.prod(self.grid), dtype=torch.bool)
        if any(not 0 <= index < len(flags) for index in hidden):
            raise ConfigError("a patch outside the image is hidden", f"number patches from 0 to {len(flags) - 1}")
        flags[list(hidden)] = True
        first = mask_from_tokens(flags)
        vit = self.models[0].model
        removed = first.removed_pixels(vit.patch_size, vit.encoder.input_size)
        return [
            self._fill(name, model, images, first if number == 0 else _same_hole(removed, name, model))
            for number, (name, model, images) in enumerate(zip(self.names, self.models, picture.images, strict=True))
        ]

    def look(self, picture: Picture) -> list[Seen]:
        """What each model sees of the whole picture: nothing is hidden."""
        return [
            self._look(name, model, images)
            for name, model, images in zip(self.names, self.models, picture.images, strict=True)
        ]

    def neighbours(self, picture: Picture, count: int = NUM_NEIGHBOURS) -> list[Neighbour]:
        """The images of the embedded data set whose features are nearest to the picture's, nearest first.

        Raises:
            ConfigError: there is no embedded data set.
        """
        if self._bank is None:
            raise ConfigError("there are no features to look among", "give --features FILE, written by torchmae embed")
        with self._busy:
            query = Subject("model", self.models[0].model).encode(picture.images[0], self._bank.pool).float()
        found, cosines = (item[0].tolist() for item in nearest(self._bank.features, query, count))
        classes = self.models[0].description.classes
        return [
            Neighbour(
                str(self._bank.names[index]),
                name_of(int(self._bank.labels[index]), classes),
                cosine,
                self._image_of(str(self._bank.names[index])),
            )
            for index, cosine in zip(found, cosines, strict=True)
        ]

    def _picture(self, image: npt.NDArray[Any]) -> Picture:
        return Picture(tuple(model.preprocess(image).to(self._device) for model in self.models))

    def _examples(self) -> tuple[FloatArray, ...]:
        """Some of the held-out images, (C, H, W) in [0, 1]."""
        if self._data is None:
            return ()
        images, _ = sample(held_out(self._data), NUM_EXAMPLES)
        description = self.models[0].description
        shown: FloatArray = description.normalisation.shown(images).numpy()
        return tuple(shown)

    def _fill(self, name: str, pretrained: Pretrained, images: Tensor, mask: Mask) -> Filled:
        with self._busy:
            result = pretrained.reconstruct(images, mask.to(images.device))
        original, filled, guess = (
            torch.from_numpy(_to_show(pretrained, item))
            for item in (images, result.images, interpolate(images, result.removed))
        )
        removed = result.removed[0].cpu()
        model = pretrained.model
        error = patchify((filled - original)[None], model.patch_size).square().mean(-1).sqrt()[0]
        flags = mask.removed()[0].cpu()
        return Filled(
            name=name,
            original=original.numpy(),
            reconstructed=filled.numpy(),
            error=error.masked_fill(~flags, torch.nan).view(model.encoder.grid).numpy(),
            hidden=float(flags.float().mean()),
            model=_errors(filled, original, removed),
            interpolation=_errors(guess, original, removed),
            norm_pix=model.target.norm_pix,
        )

    def _look(self, name: str, pretrained: Pretrained, images: Tensor) -> Seen:
        model = pretrained.model
        with self._busy:
            colours = patch_colours(content_tokens(model, images))
            attention = class_attention(model, images)[0] if model.encoder.has_class_token else None
        grid = model.encoder.grid
        return Seen(
            name,
            _to_show(pretrained, images),
            colours.reshape(*grid, 3),
            None if attention is None else attention.reshape(-1, *grid),
        )

    def _image_of(self, name: str) -> FloatArray | None:
        """An image by the name that `torchmae embed` gave it, where it is still there."""
        pretrained = self.models[0]
        try:
            if Path(name).is_file():
                return _to_show(pretrained, pretrained.preprocess(name))
            found = self._places.get(name)
            if found is None:
                return None
            loader, index = found
            return _to_show(pretrained, next(iter(loader.eval_batches(np.array([index]), 1))).images)
        except (DataError, ConfigError, OSError):
            return None

    @cached_property
    def _places(self) -> dict[str, tuple[ImageLoader, int]]:
        """Where images are that are no files of their own."""
        if self._data is None:
            return {}
        loaders = [loader for loader in (self._data.train, self._data.val) if loader is not None]
        return {loader.source.name(i): (loader, i) for loader in loaders for i in range(len(loader))}


def open_session(
    runs: Sequence[Path],
    *,
    features: Path | None = None,
    source: str | None = None,
    root: str | None = None,
    device: str = "auto",
    target: str | None = None,
    say: Callable[[str], None],
) -> Session:
    """Loads what a page shows.

    Args:
        runs: one, or two to compare: run folders, exported models, or weights of others.
        features: an embedded data set, as for `read_bank`; None: there is none.
        source: where examples come from, as `torchmae pretrain --data` takes it; None: the first run's own data, if
            they are still there.
        root: where torchvision's sets are kept; None: as the run had it.
        device: "auto" or a torch device.
        target: as for `pretrained.load`.
        say: told what was found out on the way, a line each.

    Raises:
        TorchmaeError: a model, features or named data that cannot be used.
    """
    if len(runs) > MAX_RUNS:
        raise ConfigError(f"{len(runs)} runs are given", "the page compares two; `torchmae report` takes more")
    runtime = open_runtime(device, "fp32", None)
    loaded = [(str(run), load(run, target=target)) for run in runs]
    for name, pretrained in loaded:
        pretrained.model.to(runtime.device)
        check_model(name, pretrained)
        for note in pretrained.notes:
            say(f"{name}: {note}")
    bank = None if features is None else read_bank(features, runtime.device)
    try:
        data = open_run_data(runs[0], loaded[0][1], runtime, source, root)
    except TorchmaeError as error:
        if source is not None:
            raise
        say(f"no example images: {error.problem}")
        data = None
    return Session(loaded, runtime.device, data, bank)


def read_bank(path: Path, device: torch.device) -> Bank:
    """An embedded data set.

    Args:
        path: .npz or .parquet, written by `torchmae embed`.
        device: where to compare.

    Raises:
        DataError: the file is missing, damaged, empty or of other things.
        ConfigError: features of every patch: no single vector for an image.
    """
    features, labels, names, about = read_features(path)
    if features.ndim != 2:
        raise ConfigError(
            f"{path} holds features of every patch, shape {features.shape}", "embed the images with --pool mean"
        )
    if not len(features):
        raise DataError(f"{path} holds no images", "embed some with torchmae embed")
    return Bank(torch.from_numpy(features).to(device), labels, names, about.get("pool", "mean"), about.get("weights"))


def check_model(name: str, pretrained: Pretrained) -> None:
    """ConfigError unless the page can show what the model does: images, cut into patches."""
    size = pretrained.description.input_size
    if len(size) != 2:
        kind = {1: "signals", 3: "volumes"}[len(size)]
        raise ConfigError(
            f"{name} is a model of {kind} ({len(size)} axes) and the page shows images",
            "use `torchmae reconstruct` and `torchmae visualize`",
        )
    try:
        require_patches(pretrained.model, "to look at")
    except ConfigError as error:
        raise ConfigError(f"{name}: {error.problem}", error.fix) from error


def check_same_images(first: tuple[str, Pretrained], second: tuple[str, Pretrained]) -> None:
    """ConfigError unless both take the same crop of the same images."""
    (one, a), (other, b) = first, second
    channels, others = (model.description.arguments["in_chans"] for model in (a, b))
    if channels != others:
        raise ConfigError(
            f"{one} takes images of {channels} channels and {other} of {others}", "compare runs on the same images"
        )
    (height, width), (height2, width2) = a.description.input_size, b.description.input_size
    if height * width2 != height2 * width:
        raise ConfigError(
            f"{one} takes images of {height}x{width} and {other} of {height2}x{width2}, other proportions",
            "compare runs that crop images alike",
        )


def check_bank(bank: Bank, pretrained: Pretrained) -> None:
    """ConfigError unless the features are as long as those of the model, pooled the same way."""
    subject = Subject("model", pretrained.model)
    if bank.pool not in subject.pools:
        raise ConfigError(f"pool is {bank.pool!r} but the model has no class token", "embed the images with this run")
    if bank.weights not in (None, subject.fingerprint()):
        raise ConfigError("the features are those of another model", "embed the images with this run")
    expected = pretrained.model.encoder.embed_dim * (2 if bank.pool == "both" else 1)
    if bank.features.shape[1] != expected:
        raise ConfigError(
            f"the features have {bank.features.shape[1]} values an image and this model gives {expected}",
            "embed the images with this run",
        )


def _to_show(pretrained: Pretrained, images: Tensor) -> FloatArray:
    """(1, C, H, W) as the model takes it to (C, H, W) in [0, 1]."""
    shown: FloatArray = pretrained.description.normalisation.shown(images)[0].numpy()
    return shown


def _errors(guess: Tensor, truth: Tensor, removed: Tensor) -> Errors:
    """Over the hidden values; all (C, H, W), `removed` with one channel or C."""
    mse = float((guess - truth).square()[removed.expand_as(truth)].mean())
    return Errors(mse, -10 * math.log10(max(mse, _SMALLEST_ERROR)))


def _same_hole(removed: Tensor, name: str, pretrained: Pretrained) -> Mask:
    """A hole of the first run, (1, 1, H, W) bool, in the patches of another one, which may be of another size."""
    size = pretrained.description.input_size
    resized = F.interpolate(removed.float(), size=size, mode="nearest")[:, 0] > 0
    try:
        return mask_from_pixels(resized, pretrained.model.patch_size)
    except ConfigError as error:
        raise ConfigError(f"{name}, whose patches are larger: {error.problem}", "hide less, or a block") from error
