"""The settings of `torchmae export` and `torchmae push`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torchmae.config.base import POSITIONAL, Place, RunArgument, TargetOption


@dataclass(frozen=True)
class ExportOptions(TargetOption):
    """Export format and model card.

    Attributes:
        to: timm (a folder for create_model), hf-mae (transformers' ViTMAEForPreTraining), hf-vit (its ViTModel),
            official (the released checkpoints' layout), onnx, or safetensors (torchmae's own).
        part: onnx: encoder, or reconstruction.
        data_licence: licence of the training images, for the model card.
    """

    to: Literal["timm", "hf-mae", "hf-vit", "official", "onnx", "safetensors"] = "safetensors"
    part: Literal["encoder", "reconstruction"] = "encoder"
    data_licence: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExportCommand(RunArgument):
    """Writes a model for timm, transformers, ONNX and others, with a model card, and checks it.

    The other library reads the export back, and both outputs are compared. A failed export leaves no folder.

    Attributes:
        out: a new folder.
    """

    out: Place


@dataclass(frozen=True, kw_only=True)
class PushCommand(RunArgument):
    """Exports a model, checks it, and uploads it to the Hugging Face hub.

    The token is HF_TOKEN, or the one that `hf auth login` stored. Only this command, --trackers, and data downloaded
    by name use the network.

    Attributes:
        repo: USER/NAME of the repository on the hub; it is created if it does not exist.
        private: make a new repository private.
    """

    repo: Annotated[str, POSITIONAL]
    private: bool = False
