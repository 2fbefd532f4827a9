"""What to plan for, and the GPUs to choose from; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from torchmae.errors import ConfigError, one_of, within


@dataclass(frozen=True)
class Gpu:
    """A GPU, by its data sheet.

    Attributes:
        name: what people call it.
        tflops: peak of dense bf16 matrix products, 10^12 operations a second.
        memory: GiB.
        link: GB a second that it sends to others of its machine, one way.
        network: GB a second that a machine of 8 sends to others, one way, in a cluster usual for the GPU.
    """

    name: str
    tflops: float
    memory: float
    link: float
    network: float


GPUS = {
    "a100": Gpu("A100 80 GB", 312, 80, 300, 200),
    "h100": Gpu("H100 80 GB", 989, 80, 450, 400),
    "h200": Gpu("H200", 989, 141, 450, 400),
    "b200": Gpu("B200", 2250, 180, 900, 400),
    "l40s": Gpu("L40S", 362, 48, 25, 50),
    "rtx4090": Gpu("RTX 4090", 165, 24, 25, 1.25),
}


MEASURED_MFU = {1.29: 0.110, 58.0: 0.299, 123.6: 0.333}
"""GFLOP an image to the share of the data sheet's peak that a compiled training step reached on one H100 (ViT-Tiny/4 at
32 px, ViT-B/16, ViT-L/16; docs/performance.md)."""


@dataclass(frozen=True)
class PlanOptions:
    """What to plan for.

    Attributes:
        model: a preset (vit_tiny, vit_small, vit_base, vit_large, vit_huge, ...).
        images: training images; 1.28M and 300k are understood.
        epochs: passes over them.
        batch_size: images per optimiser step, over all GPUs.
        mask_ratio: share of the patches that is hidden.
        input_size: image size in pixels, for every axis; null: the preset's.
        gpus: how many, 8 to a machine.
        gpu: a100, h100, h200, b200, l40s or rtx4090.
        mfu: share of the GPU's peak that is reached; null: what a compiled model of this size reached on an H100
            (`MEASURED_MFU`). `torchmae bench step` measures it on another GPU.
        parallel: "ddp" or "fsdp".
        compress_gradients: exchange gradients in bf16.
        checkpoint_activations: compute blocks again in the backward pass.
        image_kb: size of a stored image, kB (110: ImageNet's JPEG).
        decode_rate: images a second that one processor core reads, crops and resizes.
        cores: processor cores for each GPU.
    """

    model: str = "vit_base"
    images: str = "1.28M"
    epochs: int = 400
    batch_size: int = 4096
    mask_ratio: float = 0.75
    input_size: int | None = None
    gpus: int = 8
    gpu: str = "h100"
    mfu: float | None = None
    parallel: str = "ddp"
    compress_gradients: bool = False
    checkpoint_activations: bool = False
    image_kb: float = 110.0
    decode_rate: float = 550.0
    cores: float = 12.0

    def __post_init__(self) -> None:
        one_of("gpu", self.gpu, GPUS)
        one_of("parallel", self.parallel, ("ddp", "fsdp"))
        number_of(self.images)
        within("epochs", self.epochs, 1, 1e6)
        within("gpus", self.gpus, 1, 1e5)
        within("batch_size", self.batch_size, self.gpus, 1e6)
        within("mfu", self.mfu, 0, 1, open_low=True)
        within("image_kb", self.image_kb, 0, 1e9, open_low=True)
        within("decode_rate", self.decode_rate, 0, 1e9, open_low=True)
        within("cores", self.cores, 0, 1e4, open_low=True)


def number_of(text: str) -> float:
    """A count such as 1.28M, 300k or 50000; ConfigError for anything else."""
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
