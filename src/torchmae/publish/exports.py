"""What all export formats share: the model to export, what a format can hold, and the check of the written files."""

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
from torchmae.words import kind_of

PROBE_IMAGES = 3
TOLERANCE = 1e-4
"""Largest difference that passes a check, relative to the largest value compared (absolute if that is below 1)."""


@dataclass(frozen=True)
class Exported:
    """A model to export, with the facts that its users need."""

    model: MaskedAutoencoder | Classifier  # on the CPU, in eval mode
    description: Description | ClassifierDescription
    part: str = "encoder"  # what is written: the "encoder" (in some formats the whole model) or the "reconstruction"
    notes: tuple[str, ...] = ()  # what was not used or was assumed when the model was read, a sentence each
    mask_ratio: float = 0.75  # in training
    classes: tuple[str, ...] | None = None  # the name of each logit of a classifier, where known

    @property
    def encoder(self) -> Encoder:
        """The encoder; a classifier is its own encoder."""
        return self.model if isinstance(self.model, Classifier) else self.model.encoder

    @property
    def kind(self) -> str:
        """The encoder's name in `ENCODERS`; "" if it is not there."""
        return next((name for name, kind in ENCODERS.items() if isinstance(self.encoder, kind)), "")

    @property
    def samples(self) -> str:
        """What a sample is, as in `words.kind_of`."""
        if isinstance(self.description, Description):
            return self.description.kind
        return kind_of(len(self.encoder.input_size))

    @property
    def autoencoder(self) -> MaskedAutoencoder:
        """The model, which must not be a classifier."""
        assert not isinstance(self.model, Classifier)
        return self.model

    @property
    def shape(self) -> str:
        """The shape of a batch of images, as text."""
        return f"(batch, {', '.join(map(str, (self.encoder.in_chans, *self.encoder.input_size)))})"

    def probe(self) -> Tensor:
        """Fixed random images (PROBE_IMAGES, C, *size), on which models are compared."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(PROBE_IMAGES, self.encoder.in_chans, *self.encoder.input_size, generator=generator)

    def noise(self) -> Tensor:
        """Fixed uniform numbers (PROBE_IMAGES, L) for masks."""
        return torch.rand(PROBE_IMAGES, self.encoder.num_patches, generator=torch.Generator().manual_seed(1))


class Check(NamedTuple):
    """A comparison of the written files with the model."""

    by: str  # the library that read the files
    what: str  # what was compared: weights, features, ...
    difference: float  # the largest
    largest: float  # absolute value of the model

    @property
    def passed(self) -> bool:
        """Whether both are equal up to rounding."""
        return isfinite(self.difference) and self.difference <= TOLERANCE * max(1.0, self.largest)

    def __str__(self) -> str:
        return f"{self.by}: {self.what}, largest difference {self.difference:.1e} (of values up to {self.largest:.3g})"


@dataclass(frozen=True)
class Holds:
    """What a format can hold."""

    encoders: tuple[str, ...] | None  # names in `ENCODERS`; None: any encoder
    images: bool = True  # only models with two spatial axes
    as_published: bool = False  # only square images and patches, a class token and no registers, as in the paper
    decoder: Literal["", "any", "published"] = ""  # none, any, or only the paper's
    classifiers: bool = True  # fine-tuned classifiers too
    parts: tuple[str, ...] = ("encoder",)  # parts of a model that can be written; the first is the default

    def refusal(self, exported: Exported) -> str:
        """What the model has that the format cannot hold; "" if there is nothing."""
        model, encoder = exported.model, exported.encoder
        if self.encoders is not None and exported.kind not in self.encoders:
            return "an encoder of another kind"
        if self.images and len(encoder.patch_size) != 2:
            return f"inputs of {len(encoder.patch_size)} {'axis' if len(encoder.patch_size) == 1 else 'axes'}"
        if self.images and exported.description.normalise == "sample":
            return "images that are normalised one by one (data.normalise sample)"
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
    """An export format."""

    write: Callable[[Path, Exported], None]  # writes a model's files into a folder
    check: Callable[[Path, Exported], Check]  # reads them back with the library that they are for, and compares
    usage: Callable[[Exported], str]  # Python code for the model card: loads "FOLDER" and applies it to `images`
    library: str  # that loads the files
    holds: Holds


def compare(by: str, what: str, got: Tensor, wanted: Tensor) -> Check:
    """Compares two tensors; the difference is infinite if their shapes differ."""
    if got.shape != wanted.shape:
        return Check(by, what, float("inf"), wanted.abs().max().item())
    return Check(by, what, (got.double() - wanted.double()).abs().max().item(), wanted.abs().max().item())


def worst(checks: list[Check]) -> Check:
    """A check that did not pass, else the one with the largest relative difference."""
    return max(checks, key=lambda check: (not check.passed, check.difference / max(1.0, check.largest)))


def save_tensors(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes a .safetensors file with the metadata that transformers and timm expect."""
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
    save_file(copies, path, metadata={"format": "pt"})
