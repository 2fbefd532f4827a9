"""A trained model, ready to be fed with images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchmae.data.decode import decode
from torchmae.data.transforms import eval_box, normalise, resample, value_range
from torchmae.errors import ConfigError, DataError
from torchmae.nn.autoencoder import Autoencoder, Reconstruction
from torchmae.random import Purpose, uniform
from torchmae.training.saved_model import Description, load_model


class Pretrained:
    """A trained model with what it needs to be fed.

    Attributes:
        model: the network, in eval mode.
        description: its arguments, normalisation and mask.
    """

    def __init__(self, model: Autoencoder, description: Description) -> None:
        self.model = model
        self.description = description

    def preprocess(self, *images: str | Path | npt.NDArray[Any]) -> Tensor:
        """Images as the model wants them: centred crop of the model's proportions, resized, normalised.

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
        array = image if isinstance(image, np.ndarray) else read_image(Path(image), channels)
        if array.dtype.kind != "f" and array.dtype not in (np.uint8, np.uint16):
            raise ConfigError(f"an image has type {array.dtype}", "give uint8, uint16 or floats from 0 to 1")
        if array.ndim != len(size) + 1 or array.shape[-1] != channels:
            raise ConfigError(
                f"an image has shape {array.shape}", f"this model takes {len(size)} axes and {channels} channels, last"
            )
        pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0)))[None]
        resized = resample(pixels, eval_box(array.shape[:-1], size)[None], size, np.zeros(1, dtype=np.bool_))
        mean, std = torch.tensor(self.description.mean), torch.tensor(self.description.std)
        return normalise(resized, mean, std, value_range(pixels.dtype))

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
            strategy: "random", "block", "grid" ("elements" for the mlp model); None: as trained.
            ratio: share that is hidden, in (0, 1); None: as trained.
            seed: another one gives other masks.
        """
        strategy = self.description.mask["strategy"] if strategy is None else strategy
        ratio = self.description.mask["ratio"] if ratio is None else ratio
        noise = uniform(seed, 0, np.arange(count), Purpose.MASK, self.model.noise_count(strategy))
        return self.model.draw_mask(strategy, torch.from_numpy(noise), ratio)


def load(run: str | Path) -> Pretrained:
    """The model of a run folder: `torchmae.load("runs/a").encode(images)`.

    Raises:
        CheckpointError: nothing there that can be loaded.
    """
    return Pretrained(*load_model(Path(run)))


def read_image(path: Path, channels: int | None) -> npt.NDArray[Any]:
    """One image file as `decode` gives it; DataError where it cannot be read."""
    try:
        return decode(path, channels)
    except DataError as error:
        raise DataError(f"cannot read {error}", "give image files, such as PNG or JPEG") from error


def denormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, C, *size) back to values in [0, 1], on the CPU; those outside are clamped."""
    shape = (1, -1, *(1,) * (images.ndim - 2))
    scale = torch.tensor(std).view(shape)
    return (images.float().cpu() * scale + torch.tensor(mean).view(shape)).clamp(0, 1)
