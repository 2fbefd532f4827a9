"""`torchmae reconstruct`: hide part of given images and let a trained model fill it in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from torchmae import settings
from torchmae.data.transforms import FULL_SCALE, eval_box, resample
from torchmae.errors import ConfigError, within
from torchmae.nn.mae import require_patches
from torchmae.nn.masking import Mask, mask_from_pixels
from torchmae.report.pictures import reconstruction_grid, save_png
from torchmae.settings import read_options
from torchmae.training.pretrained import Pretrained, load, read_image

DESCRIPTION = "Hides part of some images and lets a trained model fill it in: masked | reconstructed | original."


@dataclass(frozen=True)
class MaskOptions:
    """What is hidden; null: as the model was trained.

    Attributes:
        strategy: random, block, grid, cells2 or cells4.
        ratio: share of the patches that is removed, in (0, 1).
    """

    strategy: str | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        within("mask.ratio", self.ratio, 0, 1, open_low=True, open_high=True)


@dataclass(frozen=True)
class Options:
    """What `torchmae reconstruct` takes beside the run and the images.

    Attributes:
        mask: what is hidden.
        mask_file: an image whose white (bright) part is the hole, in place of a drawn mask: in-painting.
        out: the picture to write, a PNG file.
        seed: another one gives other masks.
        target: what weights of others were trained to predict, where they do not say: pixels or normalised (patches).
    """

    mask: MaskOptions = field(default_factory=MaskOptions)
    mask_file: Path | None = None
    out: Path = Path("reconstruction.png")
    seed: int = 0
    target: str | None = None

    def __post_init__(self) -> None:
        if self.out.suffix.lower() != ".png":
            raise ConfigError(f"out is {str(self.out)!r}", "the picture is a PNG file: give a name that ends in .png")
        within("seed", self.seed, 0, 2**64 - 1)


def main(args: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = settings.Parser(
        prog="torchmae reconstruct",
        usage="torchmae reconstruct RUN IMAGE... [OPTIONS]",
        description=DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="run folder, exported model, or weights of others (also as --init-from)")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    values, options = read_options(parser, args, Options)
    pretrained = load(values.run, target=options.target)
    for line in pretrained.notes:
        print(f"note: {line}")
    note = reconstruct(pretrained, values.images, options)
    print(f"{options.out}  ({note})")
    return 0


def reconstruct(pretrained: Pretrained, paths: Sequence[Path], options: Options) -> str:
    """Writes the picture.

    Args:
        pretrained: the model.
        paths: images.
        options: mask and output.

    Returns:
        How the target was undone.
    """
    images = pretrained.preprocess(*paths)
    if options.mask_file is not None:
        mask = hole(pretrained, options.mask_file, len(images))
    else:
        mask = pretrained.mask(len(images), strategy=options.mask.strategy, ratio=options.mask.ratio, seed=options.seed)
    result = pretrained.reconstruct(images, mask)
    shown = pretrained.description.normalisation.shown
    original = shown(images)
    masked = original.masked_fill(result.removed, torch.nan)
    grid = reconstruction_grid(masked, shown(result.images), original, note=result.note)
    save_png(grid, options.out)
    return result.note


def hole(pretrained: Pretrained, path: Path, count: int) -> Mask:
    """The mask of a hole drawn in an image, the same for `count` images.

    Args:
        pretrained: the model; it must have patches.
        path: an image whose bright part (above half) is the hole; it is cropped and resized as images are.
        count: how many images.

    Raises:
        ConfigError: a model without patches or not of images, or a hole that covers no patch or all of them.
    """
    require_patches(pretrained.model, "to put a hole in")
    size = pretrained.description.input_size
    if len(size) != 2:
        raise ConfigError(
            f"this model takes {len(size)} axes and mask_file is an image", "hide patches with --mask.ratio"
        )
    array = torch.from_numpy(read_image(path, 1)[..., 0])
    values = (array.float() / FULL_SCALE[str(array.numpy().dtype)])[None, None]
    resized = resample(values, eval_box(tuple(array.shape), size)[None], size, np.zeros(1, dtype=np.bool_))
    removed = (resized[:, 0] > 0.5).expand(count, *size)
    try:
        return mask_from_pixels(removed, pretrained.model.patch_size)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.problem}", "paint the hole white, and what stays black") from error
