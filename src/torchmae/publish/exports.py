"""What every export has in common: the model with its description, the check of what was written, and a format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from torchmae.nn import ENCODERS
from torchmae.nn.classifier import Classifier
from torchmae.nn.encoder import Encoder
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.training.saved_classifier import ClassifierDescription
from torchmae.training.saved_model import Description

PROBE_IMAGES = 3
TOLERANCE = 1e-4
"""Largest difference that a check lets pass, over the largest value compared (or over 1, if that is more)."""


@dataclass(frozen=True)
class Exported:
    """A model with what its users must know.

    Attributes:
        model: an autoencoder, or a fine-tuned classifier; on the CPU, in eval mode.
        description: as torchmae's own folders have it.
        part: what is written: the "encoder" (of some formats, the whole model), or the "reconstruction".
        notes: what was left out or taken for something else when the model was read, a sentence each.
        mask_ratio: share of the patches that was hidden in training.
        classes: the name of each logit of a classifier, where known.
        scale: for each type of stored values, the one that stood for 1 in training; None: as FULL_SCALE says.
    """

    model: MaskedAutoencoder | Classifier
    description: Description | ClassifierDescription
    part: str = "encoder"
    notes: tuple[str, ...] = ()
    mask_ratio: float = 0.75
    classes: tuple[str, ...] | None = None
    scale: Mapping[str, float] | None = None

    @property
    def encoder(self) -> Encoder:
        """The network that makes features."""
        return self.model if isinstance(self.model, Classifier) else self.model.encoder

    @property
    def kind(self) -> str:
        """The encoder's name in `ENCODERS`; empty for one that stands in no table."""
        return next((name for name, kind in ENCODERS.items() if isinstance(self.encoder, kind)), "")

    @property
    def autoencoder(self) -> MaskedAutoencoder:
        """The model of a format that holds no classifiers."""
        assert not isinstance(self.model, Classifier)
        return self.model

    @property
    def shape(self) -> str:
        """The shape of a batch of images, for people."""
        return f"(batch, {', '.join(map(str, (self.encoder.in_chans, *self.encoder.input_size)))})"

    def probe(self) -> Tensor:
        """(PROBE_IMAGES, C, *size) of noise, the same each time, to compare models on."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(PROBE_IMAGES, self.encoder.in_chans, *self.encoder.input_size, generator=generator)

    def noise(self) -> Tensor:
        """(PROBE_IMAGES, L) uniform numbers for masks, the same each time."""
        return torch.rand(PROBE_IMAGES, self.encoder.num_patches, generator=torch.Generator().manual_seed(1))


class Check(NamedTuple):
    """The largest difference of what was written, as `by` reads it, from the model, and the largest value compared."""

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


@dataclass(frozen=True)
class Holds:
    """What a format can hold.

    Attributes:
        encoders: names in `ENCODERS`; None: any encoder.
        images: two spatial axes only.
        as_published: only what the released checkpoints have: square images and patches, a class token alone.
        decoder: none, "any", or the "published" one alone.
        classifiers: fine-tuned classifiers too.
        parts: of the model that can be written; the first one unless said.
    """

    encoders: tuple[str, ...] | None
    images: bool = True
    as_published: bool = False
    decoder: Literal["", "any", "published"] = ""
    classifiers: bool = True
    parts: tuple[str, ...] = ("encoder",)

    def refusal(self, exported: Exported) -> str:
        """What a model has that the format cannot hold; empty where it can hold it."""
        model, encoder = exported.model, exported.encoder
        if self.encoders is not None and exported.kind not in self.encoders:
            return "an encoder of another kind"
        if self.images and len(encoder.patch_size) != 2:
            return f"inputs of {len(encoder.patch_size)} axes"
        if self.as_published:
            for what, size in {"images": encoder.input_size, "patches": encoder.patch_size}.items():
                if size[0] != size[1]:
                    return f"{what} of {size[0]}x{size[1]}, which are not square"
            if encoder.num_prefix_tokens != 1 or not encoder.has_class_token:
                return "registers" if encoder.has_class_token else "no class token"
        if isinstance(model, Classifier):
            fits = self.classifiers and exported.part == "encoder"
            return "" if fits else "a classifier's head on the mean of its patches, and no decoder"
        if self.decoder or exported.part != "encoder":
            if model.decoder.absent:
                return f"no decoder: {model.decoder.absent[0]}"
            if self.decoder == "published" and not model.decoder.as_published:
                return "a decoder that is not the paper's (model.decoder self)"
        return ""


class Format(NamedTuple):
    """A format of exports.

    Attributes:
        write: puts a model's files into a folder.
        check: reads them back, with the library that they are for, and compares.
        usage: Python that loads them from "FOLDER" and applies them to `images`, for the model card.
        library: that loads them.
        holds: what it can hold.
    """

    write: Callable[[Path, Exported], None]
    check: Callable[[Path, Exported], Check]
    usage: Callable[[Exported], str]
    library: str
    holds: Holds


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
