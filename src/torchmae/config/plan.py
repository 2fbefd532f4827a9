"""The settings of `torchmae plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torchmae.config.base import Count, Fraction, Positive, PositiveShare, Range, Settings, Size
from torchmae.config.pretrain import Preset
from torchmae.errors import ConfigError, within


@dataclass(frozen=True)
class PlanOptions(Settings):
    """Predicts memory, traffic, speed and GPU hours of a pre-training run from its sizes, without running it.

    Attributes:
        model: a preset (vit_tiny, vit_small, vit_base, vit_large, vit_huge, ...).
        images: number of training images, such as 1.28M or 300k.
        epochs: passes over the training images.
        batch_size: images per optimiser step, over all GPUs.
        mask_ratio: masked share of the patches.
        input_size: image size in pixels, for every axis; null: the preset's.
        gpus: number of GPUs, 8 per machine.
        gpu: a100, h100, h200, b200, l40s or rtx4090.
        mfu: share of the GPU's peak that a step reaches; null: as a compiled model of this size on an H100
            (`MEASURED_MFU`). `torchmae bench step` measures it on another GPU.
        parallel: "ddp" or "fsdp".
        compress_gradients: exchange gradients in bf16.
        checkpoint_activations: compute blocks a second time in the backward pass.
        image_kb: size of a stored image in kB (110: ImageNet's JPEG).
        decode_rate: images per second that one processor core reads, crops and resizes.
        cores: processor cores per GPU.
    """

    model: Preset = "vit_base"
    images: str = "1.28M"
    epochs: Size = 400
    batch_size: Size = 4096
    mask_ratio: Fraction = 0.75
    input_size: Count | None = None
    gpus: Annotated[int, Range(1, 100_000)] = 8
    gpu: Literal["a100", "h100", "h200", "b200", "l40s", "rtx4090"] = "h100"
    mfu: PositiveShare | None = None
    parallel: Literal["ddp", "fsdp"] = "ddp"
    compress_gradients: bool = False
    checkpoint_activations: bool = False
    image_kb: Positive = 110.0
    decode_rate: Positive = 550.0
    cores: Positive = 12.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number_of(self.images)
        within("batch_size", self.batch_size, self.gpus, 1e6)


def number_of(text: str) -> float:
    """Parses a count such as 1.28M, 300k or 50000; ConfigError for anything else."""
    factors = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}
    factor = factors.get(text[-1:].lower(), 1.0)
    digits = text[:-1] if factor != 1.0 else text
    try:
        number = float(digits.replace(",", "").replace("_", "")) * factor
    except ValueError:
        number = 0.0
    if not 1 <= number < float("inf"):
        raise ConfigError(f"images is {text!r}", "give a count such as 1.28M, 300k or 50000")
    return number
