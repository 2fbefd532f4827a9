"""Images that grow in the course of a run (DailyMAE, Gui et al. 2024, arXiv 2404.00509); `nn.masking.Masker` has the
mask ratio's schedule."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from torchmae.config import PretrainConfig
from torchmae.errors import ConfigError
from torchmae.nn.mae import MaskedAutoencoder, require_patches
from torchmae.nn.patches import grid_size

_MODE = {1: "linear", 2: "bicubic", 3: "trilinear"}


def check_progression(config: PretrainConfig, model: MaskedAutoencoder) -> None:
    """ConfigError for a progression that the model, or compilation, cannot follow."""
    changes = [
        name
        for name, value in (("start_size", config.start_size), ("mask.final_ratio", config.mask.final_ratio))
        if value is not None
    ]
    if not changes:
        return
    require_patches(model, f"whose number {changes[0]} could change")
    if config.compile:
        raise ConfigError(f"{changes[0]} changes shapes on the way, and compile is for one", "use --compile false")
    if config.start_size is not None:
        size, full = start_size(config, model), model.encoder.input_size
        if any(small > large for small, large in zip(size, full, strict=True)):
            raise ConfigError(f"start_size is {size}, larger than the input {full}", "make it smaller")
        try:
            grid_size(size, model.patch_size)
        except ConfigError as error:
            raise ConfigError(f"start_size is {size}: {error.problem}", error.fix) from error


def start_size(config: PretrainConfig, model: MaskedAutoencoder) -> tuple[int, ...]:
    """`config.start_size` as one number per axis; ConfigError for another number of axes."""
    axes = len(model.patch_size)
    assert config.start_size is not None
    size = (config.start_size,) * axes if isinstance(config.start_size, int) else tuple(config.start_size)
    if len(size) != axes:
        raise ConfigError(
            f"start_size is {size} but images have {axes} axes", "give one number for each, or one for all"
        )
    return size


def early_images(images: Tensor, model: MaskedAutoencoder, config: PretrainConfig, step: float, total: int) -> Tensor:
    """The images of a step (0 to total - 1): resampled to `start_size` in the first `start_share` of the run.

    Args:
        images: (B, C, *size).
        model: what they are for.
        config: the progression.
        step: of the run.
        total: steps of the run.

    Returns:
        (B, C, *size), fewer pixels.
    """
    if config.start_size is None or step >= config.start_share * total:
        return images
    size = start_size(config, model)
    if size == tuple(images.shape[2:]):
        return images
    axes = len(size)
    return F.interpolate(images, size=size, mode=_MODE[axes], antialias=axes == 2)
