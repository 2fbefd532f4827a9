"""`torchmae reconstruct`: masks a part of images and lets a trained model fill it in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from torchmae.config.visualize import ReconstructOptions
from torchmae.data.items import Context
from torchmae.data.transforms import FULL_SCALE, eval_box, resample
from torchmae.errors import ConfigError
from torchmae.nn.mae import require_patches
from torchmae.nn.masking import Mask, mask_from_pixels
from torchmae.report.pictures import reconstruction_grid
from torchmae.training.pretrained import Pretrained, load, read_image
from torchmae.training.runtime import open_runtime


def run(options: ReconstructOptions) -> int:
    """Runs the command; returns the exit status."""
    pretrained = load(options.run, target=options.target)
    for line in pretrained.notes:
        print(f"note: {line}")
    device = open_runtime(options.device, "fp32", None).device
    pretrained.model.to(device)
    images = pretrained.preprocess(*options.images)
    if options.mask_file is not None:
        mask = mask_from_image(pretrained, options.mask_file, len(images))
    else:
        mask = pretrained.mask(len(images), strategy=options.mask.strategy, ratio=options.mask.ratio, seed=options.seed)
    result = pretrained.reconstruct(images.to(device), mask.to(device))
    shown = pretrained.description.normalisation.shown
    original = shown(images)
    masked = original.masked_fill(result.removed.cpu(), torch.nan)
    reconstruction_grid(masked, shown(result.images.cpu()), original, options.out, note=result.note)
    print(f"{options.out}  ({result.note})")
    return 0


def mask_from_image(pretrained: Pretrained, path: Path, count: int) -> Mask:
    """Makes a mask for `count` images from the bright part (above half) of an image, cropped and resized like them.

    Raises:
        ConfigError: the model has no patches or does not take images, or the mask covers no patch or all patches.
    """
    require_patches(pretrained.model, "to mask")
    size = pretrained.description.input_size
    if len(size) != 2:
        raise ConfigError(
            f"this model takes {len(size)} axes and mask_file is an image", "mask patches with --mask.ratio"
        )
    array = torch.from_numpy(read_image(path, Context(num_channels=1, spatial_dims=2))[0][..., 0])
    values = (array.float() / FULL_SCALE[str(array.numpy().dtype)])[None, None]
    resized = resample(values, eval_box(tuple(array.shape), size)[None], size, np.zeros(1, dtype=np.bool_))
    removed = (resized[:, 0] > 0.5).expand(count, *size)
    try:
        return mask_from_pixels(removed, pretrained.model.patch_size)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.problem}", "paint the hole white and the rest black") from error
