"""`torchmae reconstruct`: masks a part of images and lets a trained model fill it in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from torchmae.config.visualize import ReconstructOptions
from torchmae.data.items import Context
from torchmae.data.transforms import FULL_SCALE, resample
from torchmae.errors import ConfigError
from torchmae.nn.mae import require_patches
from torchmae.nn.masking import Mask, mask_from_pixels
from torchmae.nn.patches import patchify
from torchmae.report.pictures import reconstruction_grid
from torchmae.training.pretrained import Pretrained, load, open_file
from torchmae.training.runtime import open_runtime
from torchmae.visualize import look_of, triplet
from torchmae.words import in_words

PER_FOLDER = 8  # images of a folder


def run(options: ReconstructOptions) -> int:
    """Runs the command; returns the exit status."""
    pretrained = load(options.run, target=options.target)
    for line in pretrained.notes:
        print(f"note: {line}")
    device = open_runtime(options.device, "fp32", None).device
    pretrained.model.to(device)
    look = look_of(pretrained.description, options.show)
    given = pretrained.prepare(*options.images, limit=PER_FOLDER)
    images, valid, names = given
    if options.mask_file is not None:
        mask = mask_from_image(pretrained, options.mask_file, len(images))
        mask = mask if valid is None else mask._replace(valid=patchify(valid, pretrained.model.patch_size))
    else:
        strategy, ratio = options.mask.strategy, options.mask.ratio
        mask = pretrained.mask(len(images), strategy=strategy, ratio=ratio, seed=options.seed, valid=valid)
    result = pretrained.reconstruct(images.to(device), mask.to(device))
    versions = triplet(pretrained.description.normalisation, given, result, look)
    reconstruction_grid(*versions, options.out, note=result.note)
    of_folders = in_words(f"{len(names)} images; ", look.kind) if len(names) != len(options.images) else ""
    print(f"{options.out}  ({of_folders}{result.note})")
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
    array = torch.from_numpy(open_file(path, Context(num_channels=1, spatial_dims=2)).read(0)[..., 0])
    values = (array.float() / FULL_SCALE[str(array.numpy().dtype)])[None, None]
    resized = resample(values, pretrained.seen_of(tuple(array.shape)), size, np.zeros(1, dtype=np.bool_))
    removed = (resized[:, 0] > 0.5).expand(count, *size)
    try:
        return mask_from_pixels(removed, pretrained.model.patch_size)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.problem}", "paint the hole white and the rest black") from error
