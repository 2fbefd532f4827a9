"""A trained model, ready to be fed with images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import torchmae
from torchmae.config import ReadOptions
from torchmae.data.formats import Context, Valid, plain_type, stored_type
from torchmae.data.reading import FAR
from torchmae.data.sources import FileSource
from torchmae.data.transforms import eval_box, resample, resample_valid, window_boxes
from torchmae.errors import ConfigError, DataError, one_of
from torchmae.interop.reading import is_foreign, read_weights
from torchmae.interop.weights import Weights, build, full_arguments
from torchmae.nn.mae import MaskedAutoencoder, Reconstruction
from torchmae.nn.masking import Masker
from torchmae.paths import user_path
from torchmae.training.saved_model import Description, load_model

TARGETS = ("pixels", "normalised")


class Pretrained:
    """A trained model with what it needs to be fed.

    Attributes:
        model: the network, in eval mode.
        description: its arguments, normalisation and mask.
        notes: of weights of others, what was left out or taken for something else, a sentence each.
    """

    def __init__(self, model: MaskedAutoencoder, description: Description, notes: Sequence[str] = ()) -> None:
        self.model = model
        self.description = description
        self.notes = tuple(notes)

    @property
    def context(self) -> Context:
        """How image files for this model are opened: as those that it was trained on."""
        size, options = self.description.input_size, ReadOptions(**(self.description.reading or {}))
        if len(size) > 2 and options.pages == "first":
            options = replace(options, pages="stack")
        return Context.of(options, num_channels=self.description.arguments["in_chans"], spatial_dims=len(size))

    def preprocess(self, *images: str | Path | npt.NDArray[Any]) -> Tensor:
        """Images as the model wants them: centred crop of the model's proportions, resized, normalised.

        For a model that was trained on windows, the window in the middle. A pixel without data is 0, the mean.

        Args:
            *images: image files, or arrays (H, W, C) (or any number of spatial axes, channels last) of uint8, uint16
                or float.

        Returns:
            (B, C, *input_size) float32.

        Raises:
            DataError: a file that cannot be read.
            ConfigError: no image, or one of another type or number of channels or axes than the model takes.
        """
        if not images:
            raise ConfigError("no images were given", "give one or more files or arrays")
        return torch.cat([self._preprocess(image) for image in images])

    def _preprocess(self, image: str | Path | npt.NDArray[Any]) -> Tensor:
        size = self.description.input_size
        channels = self.description.arguments["in_chans"]
        array, valid = (image, None) if isinstance(image, np.ndarray) else read_image(Path(image), self.context)
        array = self._checked(array)
        if array.ndim != len(size) + 1 or array.shape[-1] != channels:
            raise ConfigError(
                f"an image has shape {array.shape}", f"this model takes {len(size)} axes and {channels} channels, last"
            )
        pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0)))[None]
        window, whole = self.description.window, array.shape[:-1]
        box = (
            eval_box(whole, size)[None] if window is None else window_boxes(np.full((1, len(size)), 0.5), whole, window)
        )
        flip, normalised = np.zeros(1, dtype=np.bool_), self.description.normalisation.apply
        if valid is None:
            return normalised(resample(pixels, box, size, flip), pixels.dtype)
        resized, kept = resample_valid(pixels, torch.from_numpy(valid)[None, None], box, size, flip)
        return torch.where(kept, normalised(resized, pixels.dtype), 0.0)

    def _checked(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """An image of a type, and on a scale, that the model was trained on."""
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
    def encode(self, images: Tensor, pool: str = "mean") -> Tensor:
        """Features of whole images; nothing is masked.

        Args:
            images: (B, C, *size) as `preprocess` gives them.
            pool: "mean" of the patch tokens (B, D), the class token "cls" (B, D), or all patch "tokens" (B, L, D).
        """
        return self.model.encode(images, pool)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Any) -> Reconstruction:
        """Fills in what `mask` hides; images as `preprocess` gives them."""
        return self.model.reconstruct(images, mask)

    def mask(self, count: int, *, strategy: str | None = None, ratio: float | None = None, seed: int = 0) -> Any:
        """Masks for `count` images.

        Args:
            count: images.
            strategy: a name in `model.encoder.strategies`; None: as trained.
            ratio: share that is hidden, in (0, 1); None: as trained.
            seed: another one gives other masks.
        """
        given = {"strategy": strategy, "ratio": ratio}
        trained = {name: self.description.mask[name] for name, value in given.items() if value is None}
        return Masker(self.model.encoder, **{**given, **trained})(seed, 0, np.arange(count))


def load(
    run: str | Path,
    *,
    target: str | None = None,
    input_size: Sequence[int] | None = None,
    num_heads: int | None = None,
    model: MaskedAutoencoder | None = None,
) -> Pretrained:
    """A trained model: `torchmae.load("runs/a").encode(images)`.

    Args:
        run: a run folder, an exported model, or weights of others: a released MAE checkpoint, a folder of transformers'
            ViTMAE or ViT, or timm's weights of a plain vision transformer (docs/weights.md); FILE#PART names one of
            several encoders in a file.
        target: what the decoder of others' weights was trained to predict, "pixels" or "normalised" patches, where they
            do not say.
        input_size: pixels along each axis of the images that others' weights are for, where these do not say and they
            are not square; two numbers for weights of clips: one frame is taken.
        num_heads: attention heads of others' weights, where they do not say.
        model: of a run of a model handed over in Python, this model again. A copy gets the run's weights.

    Raises:
        CheckpointError: nothing there that can be loaded.
        ConfigError: a target that the weights contradict, or one of the others beside a model that says it itself.
    """
    path = user_path(run)
    if target is not None:
        one_of("target", target, TARGETS)
    if is_foreign(path) and model is None:
        norm_pix = None if target is None else target == "normalised"
        return _adopt(read_weights(path, norm_pix=norm_pix, input_size=input_size, num_heads=num_heads))
    if target is not None:
        raise ConfigError(f"target is given and {path} says what it was", "leave --target out")
    if input_size is not None or num_heads is not None:
        raise ConfigError(f"input_size or num_heads is given and {path} says them itself", "leave them out")
    return Pretrained(*load_model(path, model))


def _adopt(weights: Weights) -> Pretrained:
    mask = {"strategy": "random", "ratio": weights.mask_ratio}
    description = Description(full_arguments(weights), weights.mean, weights.std, mask, None, torchmae.__version__)
    return Pretrained(build(weights), description, weights.notes)


def read_image(path: Path, context: Context) -> tuple[npt.NDArray[Any], Valid | None]:
    """(*size, C) of one file, and which of its pixels hold data (None: all); DataError where it cannot be read."""
    try:
        return FileSource(Path(), [str(path)], context=context).read_valid(0)
    except DataError as error:
        raise DataError(f"cannot read {error}", "give image files, such as PNG or JPEG") from error
