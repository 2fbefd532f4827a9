"""Every setting of an export and its default. Light: nothing here imports torch, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass

from torchmae.errors import ConfigError, one_of

FORMATS = ("timm", "hf-mae", "hf-vit", "official", "onnx", "safetensors")
PARTS = ("encoder", "reconstruction")


@dataclass(frozen=True)
class ExportOptions:
    """What is written.

    Attributes:
        to: timm (a folder for create_model), hf-mae (transformers' ViTMAEForPreTraining), hf-vit (its ViTModel),
            official (the released checkpoints' layout), onnx, or safetensors (torchmae's own).
        part: of onnx: encoder, or reconstruction.
        target: what weights of others were trained to predict, where they do not say: pixels or normalised (patches).
        data_licence: of the training images, for the model card.
    """

    to: str = "safetensors"
    part: str = "encoder"
    target: str | None = None
    data_licence: str | None = None

    def __post_init__(self) -> None:
        one_of("to", self.to, FORMATS)
        one_of("part", self.part, PARTS)
        if self.part != "encoder" and self.to != "onnx":
            raise ConfigError(f"part is {self.part!r} and {self.to} is always whole", "leave --part out")
