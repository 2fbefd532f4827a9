"""What every export has in common: what is exported, what a format cannot hold, and the check of what was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from torchmae.errors import ConfigError
from torchmae.nn.classifier import Classifier
from torchmae.nn.encoder import Encoder
from torchmae.nn.mae import MaskedAutoencoder

PROBE_IMAGES = 3
TOLERANCE = 1e-4
"""Largest difference that a check lets pass, over the largest value compared (or over 1, if that is more)."""


@dataclass(frozen=True)
class Exported:
    """A model with what its users must know.

    Attributes:
        model: an autoencoder, or a fine-tuned classifier; on the CPU, in eval mode.
        mean: per-channel mean of the images, in [0, 1].
        std: per-channel deviation.
        mask_ratio: that it was trained with.
        classes: the name of each logit of a classifier, where known.
        scale: for each type of stored values, the one that stood for 1 in training; None: as FULL_SCALE says.
    """

    model: MaskedAutoencoder | Classifier
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mask_ratio: float = 0.75
    classes: tuple[str, ...] | None = None
    scale: dict[str, float] | None = None

    @property
    def encoder(self) -> Encoder:
        """The encoder; ConfigError for a model without patches."""
        encoder = self.model if isinstance(self.model, Classifier) else self.model.encoder
        if not encoder.patch_size:
            raise ConfigError("this model is no vision transformer", "export it with --to safetensors")
        return encoder

    @property
    def input_size(self) -> tuple[int, ...]:
        """Pixels along each axis."""
        return self.encoder.input_size

    def probe(self) -> Tensor:
        """(PROBE_IMAGES, C, *size) of noise, the same each time, to compare models on."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(PROBE_IMAGES, self.encoder.in_chans, *self.input_size, generator=generator)

    def noise(self) -> Tensor:
        """(PROBE_IMAGES, L) uniform numbers for masks, the same each time."""
        return torch.rand(PROBE_IMAGES, self.encoder.num_patches, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Check:
    """What became of comparing what was written with the model.

    Attributes:
        by: what read the file.
        what: was compared.
        difference: the largest, in absolute value.
        largest: value compared, in absolute value.
    """

    by: str
    what: str
    difference: float
    largest: float

    @property
    def passed(self) -> bool:
        """Whether the two are equal up to rounding."""
        return isfinite(self.difference) and self.difference <= TOLERANCE * max(1.0, self.largest)

    def __str__(self) -> str:
        return f"{self.by}: {self.what}, largest difference {self.difference:.1e} (of values up to {self.largest:.3g})"


def compare(by: str, what: str, got: Tensor, wanted: Tensor) -> Check:
    """The check of one tensor against another; a difference of infinity where their shapes differ."""
    if got.shape != wanted.shape:
        return Check(by, what, float("inf"), wanted.abs().max().item())
    return Check(by, what, (got.double() - wanted.double()).abs().max().item(), wanted.abs().max().item())


def worst(checks: list[Check]) -> Check:
    """One that did not pass, else the one with the largest difference for its values."""
    return max(checks, key=lambda check: (not check.passed, check.difference / max(1.0, check.largest)))


def save_tensors(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes a .safetensors file that transformers and timm take for PyTorch's."""
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
    save_file(copies, path, metadata={"format": "pt"})


def require_images(exported: Exported, to: str) -> None:
    """ConfigError unless the model takes two spatial axes."""
    axes = len(exported.encoder.patch_size)
    if axes != 2:
        raise ConfigError(f"the model takes {axes} axes and {to} has images only", "use --to safetensors or onnx")


def require_square(exported: Exported, to: str) -> None:
    """ConfigError unless images and patches are square and there is a class token."""
    require_images(exported, to)
    for what, size in (("images", exported.input_size), ("patches", exported.encoder.patch_size)):
        if size[0] != size[1]:
            raise ConfigError(
                f"the model takes {what} of {size[0]}x{size[1]} and {to} square ones only",
                "use --to timm, safetensors or onnx",
            )
    tokens = "no class token" if not exported.encoder.has_class_token else "registers"
    if exported.encoder.num_prefix_tokens != 1 or not exported.encoder.has_class_token:
        raise ConfigError(f"the model has {tokens}, unlike those of {to}", "use --to timm, safetensors or onnx")


def require_paper_decoder(exported: Exported, to: str) -> MaskedAutoencoder:
    """The model, if it is a masked autoencoder with the paper's decoder; ConfigError for any other."""
    if isinstance(exported.model, Classifier):
        raise ConfigError(f"a classifier has no decoder, which {to} wants", "use --to timm, safetensors or onnx")
    require_square(exported, to)
    if exported.model.decoder.absent:
        reason, _ = exported.model.decoder.absent
        raise ConfigError(f"{to} wants a decoder: {reason}", "export the encoder with --to timm or hf-vit")
    if not exported.model.decoder.as_published:
        raise ConfigError(
            f"the model's decoder is not the paper's (model.decoder self), the only one that {to} has",
            "export its encoder with --to timm or hf-vit",
        )
    return exported.model
