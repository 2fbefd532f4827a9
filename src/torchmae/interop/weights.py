"""Weights from other libraries, and how they are copied into a network of another size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Never

import torch
from torch import Tensor, nn

from torchmae import presets
from torchmae.errors import CheckpointError
from torchmae.nn.decoder import Decoder
from torchmae.nn.encoder import Encoder
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.positions import resample

ENCODER_SHAPE = (
    "patch_size",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "class_token",
    "registers",
    "depths",
    "dims",
)
DECODER_SHAPE = ("decoder", "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "feature_weights")


@dataclass(frozen=True)
class Weights:
    """The weights of an encoder, and of its decoder if there is one, under torchmae's names."""

    origin: str  # the file or folder, for messages
    arguments: dict[str, Any]  # of `presets.construct`; the decoder's and norm_pix only where they are known
    encoder: dict[str, Tensor]  # the whole `state_dict()` of the encoder
    decoder: dict[str, Tensor] | None  # the whole `state_dict()` of the decoder
    no_decoder: str  # why there is no decoder
    mean: tuple[float, ...]  # of the training images, per channel, in [0, 1]
    std: tuple[float, ...]
    mask_ratio: float = 0.75  # in training, in (0, 1)
    notes: tuple[str, ...] = ()  # what is not used or was assumed, a sentence each

    @property
    def norm_pix(self) -> bool | None:
        """Whether the decoder's target was normalised patches; None: unknown."""
        return self.arguments.get("norm_pix")

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches along each axis."""
        sizes = zip(self.arguments["input_size"], self.arguments["patch_size"], strict=True)
        return tuple(size // patch for size, patch in sizes)


class AbsentDecoder(Decoder):
    """Stands for a decoder that was not loaded; reconstruction raises an error that says why."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__()
        self.absent = reason, fix
        self.embed_dim = 0

    def forward(self, *_: Any) -> Never:
        """Raises CheckpointError with the reason."""
        assert self.absent is not None
        reason, fix = self.absent
        raise CheckpointError(f"this model cannot reconstruct: {reason}", fix)

    def flops(self, seen: int, masked: int) -> int:  # noqa: ARG002
        """0, because it computes nothing."""
        return 0


def build(weights: Weights) -> MaskedAutoencoder:
    """The network of the weights, at their own size, with an `AbsentDecoder` if their decoder cannot be used."""
    arguments = full_arguments(weights)
    model = presets.construct(arguments)
    model.encoder.load_state_dict(weights.encoder)
    if weights.decoder is None:
        reason, fix = weights.no_decoder, "give weights that came with their decoder"
    elif weights.norm_pix is None:
        reason = f"{weights.origin} does not say what its decoder's target was"
        fix = (
            "say it with --target normalised (mae_pretrain_..._full.pth) or --target pixels (mae_visualize_...), to "
            "reconstruct, or to an export that every command then takes"
        )
    else:
        model.decoder.load_state_dict(weights.decoder)
        return model.eval()
    model.add_module("decoder", AbsentDecoder(reason, fix))
    return model.eval()


def full_arguments(weights: Weights) -> dict[str, Any]:
    """Arguments of `presets.construct`, with a decoder of one block if the weights have none."""
    width = weights.arguments["embed_dim"]
    smallest = {
        "decoder": "self",
        "decoder_embed_dim": width,
        "decoder_depth": 1,
        "decoder_num_heads": weights.arguments["num_heads"],
    }
    return {"drop_path": 0.0, "norm_pix": True, **smallest, **weights.arguments}


def initialise(model: MaskedAutoencoder, weights: Weights) -> tuple[str, ...]:
    """Copies weights into a network whose encoder has the same shape; its grid and channels may differ.

    The decoder is copied as a whole or not at all. Returns a sentence for each part that was copied, adapted or left
    out. CheckpointError: an encoder of another shape.
    """
    encoder, notes = fit_encoder(weights, model.encoder)
    unfit = difference(encoder, model.encoder)
    if unfit:
        fix = "leave out the model settings, which then come from the weights"
        raise CheckpointError(f"{weights.origin} does not fit the model: {unfit}", fix)
    model.encoder.load_state_dict(encoder)
    said = [f"encoder: {len(encoder)} tensors from {weights.origin}", *notes, *weights.notes]
    said += [f"head of {target.label}: starts fresh" for target in model.targets[1:]]
    decoder, problem = _fit_decoder(weights, model)
    if problem:
        return (*said, f"decoder: starts fresh ({problem})")
    model.decoder.load_state_dict(decoder)
    unsure = ""
    if weights.norm_pix is None:
        unsure = f", whose target is not known and taken for this run's, {model.target.label}"
    return (*said, f"decoder: {len(decoder)} tensors from {weights.origin}{unsure}")


def fit_encoder(weights: Weights, encoder: Encoder) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The encoder's weights, adapted to the grid and the channels of `encoder`, and a note for each change."""
    fitted, notes = dict(weights.encoder), []
    if weights.grid != encoder.grid and "pos_embed" in fitted:
        fitted["pos_embed"] = resample(fitted["pos_embed"][0], weights.grid, encoder.grid)[None]
        old, new = ("x".join(map(str, grid)) for grid in (weights.grid, encoder.grid))
        notes.append(f"positions: resampled from {old} to {new} patches")
    old_chans = weights.arguments["in_chans"]
    if old_chans != encoder.in_chans:
        name = f"{encoder.embedding}.weight"
        fitted[name] = adapt_channels(fitted[name], encoder.in_chans)
        how = "summed" if encoder.in_chans == 1 else f"repeated in turn, times {old_chans} / {encoder.in_chans}"
        notes.append(f"patch embedding: adapted from {old_chans} to {encoder.in_chans} channels ({how})")
    return fitted, tuple(notes)


def adapt_channels(weight: Tensor, in_chans: int) -> Tensor:
    """Converts a patch embedding (D, C, *patch_size) to another number of channels: (D, in_chans, *patch_size).

    timm's rule: one channel gets the sum of all; more channels repeat the old ones in turn, times C / in_chans. Images
    with equal channels then give the same tokens, exactly if in_chans is 1 or a multiple of C.
    """
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    old = weight.shape[1]
    return weight[:, torch.arange(in_chans) % old] * (old / in_chans)


def _fit_decoder(weights: Weights, model: MaskedAutoencoder) -> tuple[dict[str, Tensor], str]:
    """The decoder's weights for the grid of `model`, and the reason if they cannot be copied, else ""."""
    theirs, ours = weights.arguments["in_chans"], model.encoder.in_chans
    if weights.decoder is None:
        return {}, weights.no_decoder
    if weights.norm_pix not in (None, model.target.norm_pix):
        target = "normalised patches" if weights.norm_pix else "pixels"
        return {}, f"the source's target was {target}, this run's is {model.target.label}"
    if theirs != ours:
        return {}, f"the source predicts {theirs} channels and the data has {ours}"
    positions = resample(weights.decoder["pos_embed"][0], weights.grid, model.encoder.grid)[None]
    fitted = {**weights.decoder, "pos_embed": positions}
    return fitted, "the source's has another shape" if difference(fitted, model.decoder) else ""


def difference(given: Mapping[str, Tensor], module: nn.Module) -> str:
    """How parameters differ from a module's: missing, additional, or of another shape; "" if they fit."""
    wanted = module.state_dict()
    missing, odd = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing:
        return f"it lacks {listed(missing)}"
    if odd:
        return f"it also has {listed(odd)}"
    for name, tensor in given.items():
        if tensor.shape != wanted[name].shape:
            return f"{name} is {tuple(tensor.shape)} where {tuple(wanted[name].shape)} is wanted"
    return ""


def no_vit(origin: str, why: str) -> CheckpointError:
    """The error for weights that fit no network of torchmae."""
    return CheckpointError(f"{origin} is no vision transformer that torchmae has: {why}", "see docs/weights.md")


def listed(items: Sequence[str], most: int = 4) -> str:
    """The first `most` of several names, and the number of the others."""
    more = len(items) - most
    return ", ".join(items[:most]) + (f" and {more} more" if more > 0 else "")
