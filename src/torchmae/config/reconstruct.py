"""The settings of `torchmae reconstruct`. Light: nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from torchmae.config.base import POSITIONAL, Fraction, ModelOptions, Range, Settings
from torchmae.config.pretrain import Strategy


@dataclass(frozen=True)
class MaskOptions(Settings, group="mask."):
    """What is masked; null: as the model was trained.

    Attributes:
        strategy: name of a mask strategy, as in `torchmae pretrain`.
        ratio: share of the patches that is masked, in (0, 1).
    """

    strategy: Strategy | None = None
    ratio: Fraction | None = None


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions(ModelOptions):
    """Masks part of some images and lets a trained model fill it in: masked | reconstructed | original.

    Attributes:
        images: image files.
        mask: what is masked.
        mask_file: an image whose white (bright) part is masked, in place of a drawn mask: in-painting.
        out: the picture to write, a PNG file.
        seed: another one gives other masks.
    """

    images: Annotated[tuple[Path, ...], POSITIONAL]
    mask: MaskOptions = field(default_factory=MaskOptions)
    mask_file: Path | None = None
    out: Annotated[Path, ".png"] = Path("reconstruction.png")
    seed: Annotated[int, Range(0, 2**64 - 1)] = 0
