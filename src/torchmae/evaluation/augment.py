"""Augmentation of labelled training batches: RandAugment, mixup and cutmix, by torchvision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from torchmae.config.finetune import InputSettings
from torchmae.data.transforms import Normalisation, normalise, to_device
from torchmae.errors import ConfigError

IMAGES_PER_DRAW = 4
"""Images, neighbours in the shuffled batch, that share RandAugment's operations: a batch takes few calls."""

_NUM_OPS = 2
_LEVELS = 11  # strengths 0 to 10, as in the RandAugment paper

Augment = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def build_augment(
    settings: InputSettings, input_size: Sequence[int], normalisation: Normalisation, num_classes: int
) -> Augment:
    """A function that augments a batch: from (B, C, H, W) normalised images and (B,) labels to images and targets.

    RandAugment (Cubuk et al. 2020) draws two operations for every IMAGES_PER_DRAW images; unlike in timm, the strength
    is the same for all images. Then follows mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) with equal
    probability; targets are then (B, num_classes) float32 that sum to 1, else the labels. Random numbers come from
    torch's generator, which the trainer seeds at every step.

    Raises:
        ConfigError: an augmentation that this input cannot have.
    """
    randaugment, mixup, cutmix = settings.randaugment, settings.mixup, settings.cutmix
    if len(input_size) != 2 and (randaugment or mixup or cutmix):
        raise ConfigError(
            f"the input has {len(input_size)} spatial dimensions, and randaugment, mixup and cutmix take 2",
            "set all three to 0",
        )
    if randaugment and (channels := len(normalisation.mean)) not in (1, 3):
        raise ConfigError(f"randaugment takes 1 or 3 channels, the input has {channels}", "set randaugment to 0")
    distort = _rand_augment(normalisation, randaugment) if randaugment else None
    given = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
    mixers = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in given if alpha]
    mix = v2.RandomChoice(mixers) if mixers else None

    def augment(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if distort is not None:
            images = distort(images)
        return (images, labels) if mix is None else mix(images, labels)

    return augment


def _rand_augment(normalisation: Normalisation, strength: int) -> Callable[[Tensor], Tensor]:
    """A function that applies RandAugment to normalised images. Its operations work on bytes.

    Bytes 0 and 255 stand for the values that pictures show black and white. Values beyond them are clipped.
    """
    means, deviations = normalisation.to_shown
    grey = [min(max(round(255 * value), 0), 255) for value in means.tolist()]

    def distort(images: Tensor) -> Tensor:
        shift, scale = means.to(images.device), deviations.to(images.device)
        as_bytes = ((images * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)) * 255).round_().clamp_(0, 255).byte()
        for _ in range(_NUM_OPS):
            # Each operation once for all images that drew it: a GPU gets few, large pieces of work.
            draws = -(-len(images) // IMAGES_PER_DRAW)
            drawn, signs = torch.randint(len(OPERATIONS), (draws,)), 1 - 2 * torch.randint(2, (draws,))
            drawn, signs = (item.repeat_interleave(IMAGES_PER_DRAW)[: len(images)] for item in (drawn, signs))
            for i, operation in enumerate(OPERATIONS.values()):
                for sign in (1, -1):
                    rows = ((drawn == i) & (signs == sign)).nonzero().flatten()
                    if len(rows):
                        rows = to_device(rows, images.device)
                        as_bytes[rows] = operation(as_bytes[rows], strength / (_LEVELS - 1), sign, grey)
        return normalise(as_bytes, shift, scale, 255)

    return distort


def _warp(images: Tensor, fill: list[int], **change: object) -> Tensor:
    """An affine transformation; empty pixels get the colour `fill`."""
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    colour: list[float] = [float(value) for value in fill]
    return F.affine(images, **{**still, **change}, interpolation=InterpolationMode.BILINEAR, fill=colour)


def _degrees(slope: float) -> float:
    return math.degrees(math.atan(slope))


Operation = Callable[[Tensor, float, int, list[int]], Tensor]

# Ranges as in torchvision's RandAugment: what strength 10 means, for images of any size.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda images, _level, _sign, _fill: images,
    "shear x": lambda images, level, sign, fill: _warp(
        images, fill, shear=[_degrees(0.3 * level * sign), 0.0], center=[0, 0]
    ),
    "shear y": lambda images, level, sign, fill: _warp(
        images, fill, shear=[0.0, _degrees(0.3 * level * sign)], center=[0, 0]
    ),
    "translate x": lambda images, level, sign, fill: _warp(
        images, fill, translate=[int(150 / 331 * images.shape[-1] * level * sign), 0]
    ),
    "translate y": lambda images, level, sign, fill: _warp(
        images, fill, translate=[0, int(150 / 331 * images.shape[-2] * level * sign)]
    ),
    "rotate": lambda images, level, sign, fill: F.rotate(
        images, 30 * level * sign, InterpolationMode.BILINEAR, fill=[float(value) for value in fill]
    ),
    "brightness": lambda images, level, sign, _fill: F.adjust_brightness(images, 1 + 0.9 * level * sign),
    "colour": lambda images, level, sign, _fill: F.adjust_saturation(images, 1 + 0.9 * level * sign),
    "contrast": lambda images, level, sign, _fill: F.adjust_contrast(images, 1 + 0.9 * level * sign),
    "sharpness": lambda images, level, sign, _fill: F.adjust_sharpness(images, 1 + 0.9 * level * sign),
    "posterise": lambda images, level, _sign, _fill: F.posterize(images, 8 - round(4 * level)),
    "solarise": lambda images, level, _sign, _fill: F.solarize(images, 255 * (1 - level)),
    "autocontrast": lambda images, _level, _sign, _fill: F.autocontrast(images),
    "equalise": lambda images, _level, _sign, _fill: F.equalize(images),
}
"""RandAugment's operations on (B, C, H, W) uint8 images, given a level in [0, 1], a sign, a colour for empty pixels."""
