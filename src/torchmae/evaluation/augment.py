"""Augmentation of labelled training batches: RandAugment, mixup and cutmix, by torchvision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from torchmae.data.transforms import normalise
from torchmae.errors import ConfigError
from torchmae.evaluation.finetune_config import InputSettings

IMAGES_PER_DRAW = 4
"""Neighbours in a (shuffled) batch that share RandAugment's operations: one by one takes four times as long."""

_NUM_OPS = 2
_LEVELS = 11  # strengths 0 to 10, as in the RandAugment paper

Augment = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def build_augment(
    settings: InputSettings, input_size: Sequence[int], mean: Sequence[float], std: Sequence[float], num_classes: int
) -> Augment:
    """The augmentation of a training batch, (B, C, H, W) normalised images and (B,) labels.

    RandAugment (Cubuk et al. 2020) applies two operations; unlike in timm the strength does not vary from image to
    image. Then one of mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019), each as often, if there are any.
    Random numbers are drawn from torch's generator, which a training loop that can be resumed seeds at every step.

    Args:
        settings: randaugment, mixup and cutmix.
        input_size: pixels along each axis.
        mean: that the images were reduced by, one for each channel.
        std: that they were divided by.
        num_classes: how many classes there are.

    Returns:
        A function of images and labels to images and targets: (B, num_classes) float32 that sum to 1 when mixup or
        cutmix is on, the labels themselves otherwise.

    Raises:
        ConfigError: an augmentation that this input cannot have.
    """
    randaugment, mixup, cutmix = settings.randaugment, settings.mixup, settings.cutmix
    if len(input_size) != 2 and (randaugment or mixup or cutmix):
        raise ConfigError(
            f"the input has {len(input_size)} spatial dimensions, and randaugment, mixup and cutmix take 2",
            "set all three to 0",
        )
    if randaugment and len(mean) not in (1, 3):
        raise ConfigError(f"randaugment takes 1 or 3 channels, the input has {len(mean)}", "set randaugment to 0")
    distort = _rand_augment(mean, std, randaugment) if randaugment else None
    mixers: list[v2.Transform] = []
    if mixup:
        mixers.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix:
        mixers.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    mix = v2.RandomChoice(mixers) if mixers else None

    def augment(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if distort is not None:
            images = distort(images)
        return (images, labels) if mix is None else mix(images, labels)

    return augment


def _rand_augment(mean: Sequence[float], std: Sequence[float], strength: int) -> Callable[[Tensor], Tensor]:
    """RandAugment of normalised images; in between they are bytes, which its operations are defined on."""
    grey = [round(255 * value) for value in mean]
    transform = v2.RandAugment(_NUM_OPS, strength, _LEVELS, interpolation=InterpolationMode.BILINEAR, fill=grey)
    means, deviations = torch.tensor(mean), torch.tensor(std)

    def distort(images: Tensor) -> Tensor:
        shift, scale = means.to(images.device), deviations.to(images.device)
        as_bytes = ((images * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)) * 255).round_().clamp_(0, 255).byte()
        distorted = torch.cat([transform(part) for part in torch.split(as_bytes, IMAGES_PER_DRAW)])
        return normalise(distorted, shift, scale, 255)

    return distort
