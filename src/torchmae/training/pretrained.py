"""A trained model with its preprocessing: features and reconstructions of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import torchmae
from torchmae import presets
from torchmae.config import ReadOptions
from torchmae.data.items import Context, Valid, plain_type, stored_type
from torchmae.data.layouts import open_splits
from torchmae.data.loader import View, boxes_of
from torchmae.data.reading import FAR
from torchmae.data.sources import FileSource, Source, evenly_spaced
from torchmae.data.transforms import Boxes, resample, resample_valid
from torchmae.errors import ConfigError, DataError, TorchmaeError, one_of
from torchmae.interop.reading import is_foreign, read_weights
from torchmae.interop.timm_networks import TIMM, normalisation_of, timm_model
from torchmae.interop.weights import build, full_arguments
from torchmae.nn.mae import MaskedAutoencoder, Reconstruction
from torchmae.nn.masking import Masker
from torchmae.paths import user_path
from torchmae.training.saved_model import Description, load_model


class Prepared(NamedTuple):
    """Images for a model."""

    images: Tensor  # (B, C, *input_size) float32, normalised
    valid: Tensor | None  # (B, 1, *input_size) bool, False where a pixel holds no data and is 0; None: all do
    names: tuple[str, ...]  # where each comes from; "" for an array

    def to(self, device: torch.device) -> Prepared:
        """The same images on another device."""
        return Prepared(self.images.to(device), None if self.valid is None else self.valid.to(device), self.names)

    def part(self, rows: slice) -> Prepared:
        """Some of the images."""
        return Prepared(self.images[rows], None if self.valid is None else self.valid[rows], self.names[rows])


class Pretrained:
    """A trained model with its preprocessing.

    Attributes:
        model: the network, in eval mode.
        description: its arguments, normalisation and mask.
        notes: one sentence for each part of others' weights that was left out or replaced.
        fresh: makes the same network with fresh weights, where its arguments do not say how; else None.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        description: Description,
        notes: Sequence[str] = (),
        fresh: Callable[[], MaskedAutoencoder] | None = None,
    ) -> None:
        self.model = model
        self.description = description
        self.notes = tuple(notes)
        self.fresh = fresh

    @property
    def context(self) -> Context:
        """How image files are opened for this model: as the training images were."""
        size, options = self.description.input_size, ReadOptions(**(self.description.reading or {}))
        if len(size) > 2 and options.pages == "first":
            options = replace(options, pages="stack")
        return Context.of(options, num_channels=self.description.arguments["in_chans"], spatial_dims=len(size))

    def preprocess(self, *images: str | Path | npt.NDArray[Any]) -> Tensor:
        """Crops images to the model's aspect ratio (centred), resizes and normalises them.

        For a model that was trained on windows, the window in the middle. A pixel without data is 0, the mean.

        Args:
            *images: image files, folders, lists or archives of images, or arrays (H, W, C) (or any number of spatial
                axes, channels last) of uint8, uint16 or float.

        Returns:
            (B, C, *input_size) float32.

        Raises:
            DataError: a file cannot be read.
            ConfigError: no images, or an image whose type, channels or axes do not suit the model.
        """
        return self.prepare(*images).images

    def prepare(self, *images: str | Path | npt.NDArray[Any], limit: int | None = None) -> Prepared:
        """`preprocess`, with the names of the images and where they hold data.

        Of a folder (or list, or archive) with more than `limit` images, so many, evenly spaced. Errors as there.
        """
        if not images:
            raise ConfigError("no images were given", "give one or more files or arrays")
        prepared: list[Tensor] = []
        maps: list[Tensor] = []
        names: list[str] = []
        for given in images:
            if isinstance(given, np.ndarray):
                found: Iterable[tuple[str, npt.NDArray[Any], Valid | None]] = [("", given, None)]
            else:
                source = open_images(Path(given), self.context)
                rows = evenly_spaced(len(source), len(source) if limit is None else limit).tolist()
                found = ((source.name(row), *source.read_valid(row)) for row in rows)
            for name, array, valid in found:
                values, kept = self.prepared(array, valid)
                prepared.append(values)
                maps.append(kept)
                names.append(name)
        has_data = torch.cat(maps)
        return Prepared(torch.cat(prepared), None if bool(has_data.all()) else has_data, tuple(names))

    def prepared(self, array: npt.NDArray[Any], valid: Valid | None) -> tuple[Tensor, Tensor]:
        """One image (1, C, *input_size), and where it holds data, (1, 1, *input_size).

        `valid`, (*size), says where the array does; None: where its values are finite.
        """
        description, size = self.description, self.description.input_size
        channels = description.arguments["in_chans"]
        flip, normalised = np.zeros(1, dtype=np.bool_), description.normalisation.apply
        array = self._checked(array)
        if valid is None and array.dtype.kind == "f" and not np.isfinite(array).all():
            valid = np.isfinite(array).all(axis=-1)
        if array.ndim != len(size) + 1 or array.shape[-1] != channels:
            raise ConfigError(
                f"an image has shape {array.shape}",
                f"this model takes {len(size)} axes and {channels} channels, last",
            )
        pixels, whole = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0)))[None], array.shape[:-1]
        box = self.seen_of(whole)
        if valid is None:
            values = normalised(resample(pixels, box, size, flip), pixels.dtype)
            return values, torch.ones(1, 1, *size, dtype=torch.bool)
        resized, kept = resample_valid(pixels, torch.from_numpy(valid)[None, None], box, size, flip)
        return normalised(resized, pixels.dtype, kept), kept

    def seen_of(self, size: tuple[int, ...]) -> Boxes:
        """(1, n, 2) the part that the model sees of an image of this size: the window in the middle, or the crop."""
        view = View(self.description.input_size, (1, 1), (1, 1), False, self.description.window)
        return boxes_of(np.empty((1, 0), np.float32), size, view)

    def _checked(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The image; ConfigError if the model was trained on another type or scale."""
        trained = self.description.normalisation.scale or {}
        if "float32" in trained and stored_type(array.dtype) == np.float32:
            array = plain_type(array)
        if "float32" in trained and len(trained) == 1 and array.dtype.kind in "ui":
            raise ConfigError(
                f"an image has type {array.dtype} and the model was trained on floats, taken as they are",
                "convert it to float32, in the unit of the training data",
            )
        if array.dtype.kind != "f" and array.dtype not in (np.uint8, np.uint16):
            raise ConfigError(f"an image has type {array.dtype}", "give uint8, uint16 or floats from 0 to 1")
        if trained and "float32" not in trained and array.dtype.kind == "f" and np.nanmax(np.abs(array)) > FAR:
            kinds = ", ".join(f"{kind} divided by {one:g}" for kind, one in trained.items())
            raise ConfigError(
                f"an image has floats up to {np.nanmax(np.abs(array)):g} and the model was trained on {kinds}",
                "divide by the same number first",
            )
        return array

    @torch.no_grad()
    def encode(
        self, images: Tensor, pool: str = "mean", valid: Tensor | None = None, blocks: Sequence[int] | None = None
    ) -> Tensor:
        """Features of whole images, (B, C, *size) from `preprocess` or `prepare`, as of `MaskedAutoencoder.encode`."""
        return self.model.encode(images, pool, valid, blocks)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Any) -> Reconstruction:
        """Predicts the masked part of images, (B, C, *size) from `preprocess`."""
        return self.model.reconstruct(images, mask)

    def mask(
        self,
        count: int,
        *,
        strategy: str | None = None,
        ratio: float | None = None,
        seed: int = 0,
        valid: Tensor | None = None,
    ) -> Any:
        """Masks for `count` images, drawn from `seed`; on the device of `valid`, which is as for `encode`.

        `strategy` is a name in `model.encoder.strategies`, `ratio` the masked share in (0, 1); None: as trained.
        """
        given = {"strategy": strategy, "ratio": ratio}
        trained = {name: self.description.mask[name] for name, value in given.items() if value is None}
        masker = Masker(self.model.encoder, **{**given, **trained})
        return masker(seed, 0, np.arange(count), "cpu" if valid is None else valid.device, valid)


def load(
    run: str | Path,
    *,
    target: str | None = None,
    input_size: Sequence[int] | None = None,
    num_heads: int | None = None,
    model: MaskedAutoencoder | None = None,
) -> Pretrained:
    """Loads a trained model: `torchmae.load("runs/a").encode(images)`.

    Args:
        run: a run folder, an exported model, or weights of others: a released MAE checkpoint, a folder of transformers'
            ViTMAE, ViT or Pixio, or timm's weights of a plain vision transformer (docs/weights.md). FILE#PART selects
            one of several encoders in a file. "timm:NAME" is a vision transformer of timm with its pre-trained weights,
            for features.
        target: the decoder's training target, "pixels" or "normalised" patches, if others' weights do not store it.
        input_size: image size in pixels along each axis, if others' weights do not store it and images are not square.
            Two numbers for weights of video clips take one frame.
        num_heads: number of attention heads, if others' weights do not store it.
        model: the model of a run that was started with a model in Python. A copy gets the run's weights.

    Raises:
        CheckpointError: `run` holds nothing that can be loaded.
        ConfigError: `target` contradicts the weights, or the model's own files give `target`, `input_size` or
            `num_heads`; timm cannot make the network.
    """
    path = user_path(run)
    if target is not None:
        one_of("target", target, ("pixels", "normalised"))
    if is_foreign(path) and model is None:
        norm_pix = None if target is None else target == "normalised"
        weights = read_weights(path, norm_pix=norm_pix, input_size=input_size, num_heads=num_heads)
        mask = {"strategy": "random", "ratio": weights.mask_ratio}
        description = Description(full_arguments(weights), weights.mean, weights.std, mask, None, torchmae.__version__)
        return Pretrained(build(weights), description, weights.notes)
    if target is not None:
        raise ConfigError(f"target is given and {path} says what it was", "leave --target out")
    if input_size is not None or num_heads is not None:
        raise ConfigError(f"input_size or num_heads is given and {path} says them itself", "leave them out")
    if str(run).startswith(TIMM):
        return _from_timm(str(run).removeprefix(TIMM))
    return Pretrained(*load_model(path, model))


def _from_timm(name: str) -> Pretrained:
    """Loads a network of timm by name. ConfigError: it cannot be made."""
    model = timm_model(name)
    mean, std = normalisation_of(model.encoder.network)
    mask = {"strategy": "random", "ratio": 0.75}  # no reconstruction reads it
    description = Description(presets.own_arguments(model), mean, std, mask, None, torchmae.__version__)
    return Pretrained(model, description, fresh=partial(timm_model, name, pretrained=False))


def open_images(path: Path, context: Context) -> Source:
    """The image in a file, or those of a folder, list, archive or array, as `torchmae pretrain` finds them there.

    Held-out images come first: those of a test, else a val, else the train split. DataError: they cannot be read.
    """
    problem = None
    if not path.is_dir():
        try:
            return open_file(path, context)
        except DataError as error:
            problem = error
    try:
        splits = open_splits(str(path), replace(context, num_channels=None))
        source = next(splits[name] for name in ("test", "val", "train") if name in splits)
        return source.with_channels(context.num_channels or 1)
    except TorchmaeError as error:
        if problem is None or path.suffix in (".txt", ".csv", ".tsv"):  # meant as a folder or a list
            problem = DataError(f"cannot read {path}: {error.problem}")
        raise DataError(problem.problem, "give files or a folder, as for torchmae pretrain --data") from error


def open_file(path: Path, context: Context) -> Source:
    """The image in a file; DataError: it cannot be read."""
    single = FileSource(Path(), [str(path)], context=context)
    try:
        single.open(0)
    except DataError as error:
        fix = error.fix or "give image files, such as PNG or JPEG"
        raise DataError(f"cannot read {path}: {error.problem}", fix) from error
    return single
