"""The settings of `torchmae embed`. Light: nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from torchmae.config.base import Place, RunArgument
from torchmae.config.data import DataOptions


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(RunArgument):
    """Writes the features of all images of a data set to a file.

    Nothing is masked. A command that was stopped goes on where it was when it is given again. torchrun starts it on
    several GPUs.

    Attributes:
        data: the images.
        out: the file to write, .npz or .parquet.
        pool: features of an image: mean (of its patch tokens), cls (the class token), both (one after the other), or
            tokens (every patch token).
        split: train, val, test, or all: whatever the data has.
    """

    data: DataOptions = field(default_factory=DataOptions)
    out: Annotated[Place, ".npz", ".parquet"] = "features.npz"
    pool: Literal["mean", "cls", "both", "tokens"] = "mean"
    split: Literal["train", "val", "test", "all"] = "all"
