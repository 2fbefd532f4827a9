"""The settings of `torchmae export` and `torchmae push`. Light: nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torchmae.config.base import POSITIONAL, Place, RunArgument, TargetOption


@dataclass(frozen=True)
class ExportOptions(TargetOption):
    """What is written.

    Attributes:
        to: timm (a folder for create_model), hf-mae (transformers' ViTMAEForPreTraining), hf-vit (its ViTModel),
            official (the released checkpoints' layout), onnx, or safetensors (torchmae's own).
        part: of onnx: encoder, or reconstruction.
        data_licence: of the training images, for the model card.
    """

    to: Literal["timm", "hf-mae", "hf-vit", "official", "onnx", "safetensors"] = "safetensors"
    part: Literal["encoder", "reconstruction"] = "encoder"
    data_licence: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExportCommand(RunArgument):
    """Writes a model for timm, transformers, ONNX and others, with a model card, and checks it.

    The folder that is written is read back with the other library, and what both compute is compared. The folder is
    there whole and compared, or not at all.

    Attributes:
        out: the folder to make.
    """

    out: Place


@dataclass(frozen=True, kw_only=True)
class PushCommand(RunArgument):
    """Exports a model, checks it, and uploads it to the Hugging Face hub.

    The token is HF_TOKEN, or what `hf auth login` stored. Otherwise only data that is downloaded by name, and
    --trackers, use the network.

    Attributes:
        repo: USER/NAME of the repository on the hub; made if it does not exist.
        private: make a new repository private.
    """

    repo: Annotated[str, POSITIONAL]
    private: bool = False
