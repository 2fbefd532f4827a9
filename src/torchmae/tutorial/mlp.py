"""The tutorial's fully connected model, whose masks remove single values: encoder, decoder, target, mask strategies.

`output_relu=True`, `loss_on="all"` and the strategy "elements_inverted" are what the tutorial's code does; the other
choices are what its text describes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchmae.errors import ConfigError, one_of
from torchmae.nn.decoder import Decoder
from torchmae.nn.encoder import Encoder, EncoderOutput
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Strategy, check_ratio
from torchmae.nn.targets import Target

PRESETS: dict[str, dict[str, Any]] = {
    "mlp": {"input_size": (32, 32), "in_chans": 3, "hidden_dim": 128, "output_relu": False, "loss_on": "hidden"},
}


class ElementMask(NamedTuple):
    """A mask of single values; the number of masked ones differs from sample to sample."""

    flags: Tensor  # (B, N) bool, True where a value of the flattened image is removed

    @property
    def ids_keep(self) -> Tensor:
        """(B, N) bool, True where the encoder sees a value."""
        return ~self.flags

    def removed_pixels(self, patch_size: Sequence[int], size: Sequence[int]) -> Tensor:  # noqa: ARG002
        """(B, C, *size) bool, True where a value is removed."""
        return self.flags.view(len(self.flags), -1, *size)

    def check(self, batch: int, length: int) -> None:
        """As `Mask.check`."""
        if self.flags.shape != (batch, length):
            raise ConfigError(
                f"the mask has shape {tuple(self.flags.shape)}", f"give one of shape ({batch}, {length}), flat"
            )

    def to(self, device: torch.device | str) -> ElementMask:
        """As `Mask.to`."""
        return ElementMask(self.flags.to(device))

    def tensor_split(self, parts: int) -> list[ElementMask]:
        """As `Mask.tensor_split`."""
        return [ElementMask(part) for part in self.flags.tensor_split(parts)]


def elements_mask(noise: Tensor, grid: Sequence[int], ratio: float) -> ElementMask:  # noqa: ARG001
    """Removes each value independently with probability `ratio`, in (0, 1), else ConfigError.

    `noise` is (B, N), one uniform random number for each value of a flattened image.
    """
    check_ratio(ratio)
    return ElementMask(noise < ratio)


def inverted_elements_mask(noise: Tensor, grid: Sequence[int], ratio: float) -> ElementMask:
    """The mask of the tutorial's code, which multiplies the input by `noise < ratio` and so keeps that share of it."""
    return ElementMask(~elements_mask(noise, grid, ratio).flags)


STRATEGIES = {
    "elements": Strategy(elements_mask, prod),
    "elements_inverted": Strategy(inverted_elements_mask, prod, evaluated=False),
}


class FlatEncoder(nn.Sequential, Encoder):
    """Z = ReLU(W_e (X * M) + b_e), where X is the flattened image; Z has `hidden_dim` values."""

    strategies = STRATEGIES

    def __init__(self, input_size: Sequence[int], in_chans: int, hidden_dim: int) -> None:
        width = prod(input_size) * in_chans
        super().__init__(nn.Linear(width, hidden_dim), nn.ReLU())
        self.input_size = tuple(input_size)
        self.in_chans = in_chans
        self.grid = (in_chans, *self.input_size)
        self.patch_size = ()
        self.embed_dim = hidden_dim

    def grid_of(self, images: Tensor) -> tuple[int, ...]:
        """The grid, in which each value is a cell; ConfigError: images of another shape."""
        if images.shape[1:] != self.grid:
            wanted = ", ".join(str(size) for size in self.grid)
            raise ConfigError(f"images have shape {tuple(images.shape)}", f"this model takes (batch, {wanted})")
        return self.grid

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> EncoderOutput:
        """Z as one token (B, 1, hidden_dim); `ids_keep` (B, N) bool is True where a value is not set to zero."""
        grid = self.grid_of(images)
        x = images.flatten(1)
        if ids_keep is not None:
            x = x.masked_fill(~ids_keep, 0)
        z = nn.Sequential.forward(self, x)[:, None]  # type: ignore[no-untyped-call]
        return EncoderOutput(z[:, :0], z, grid)

    def flops(self, kept: int) -> tuple[int, int]:  # noqa: ARG002
        """Operations of the one layer, which computes on all values, and 0 for the rest."""
        return 2 * self.num_patches * self.embed_dim, 0


class FlatDecoder(nn.Sequential, Decoder):
    """The prediction W_d Z + b_d of all `width` values of an image.

    `output_relu` adds a ReLU, which cannot predict values below zero.
    """

    def __init__(self, hidden_dim: int, width: int, *, output_relu: bool) -> None:
        super().__init__(nn.Linear(hidden_dim, width), nn.ReLU() if output_relu else nn.Identity())
        self.embed_dim = width
        self.hidden_dim = hidden_dim

    def forward(self, encoded: EncoderOutput, mask: ElementMask) -> Tensor:  # type: ignore[override]  # noqa: ARG002
        """(B, N) predictions."""
        return nn.Sequential.forward(self, encoded.patches.squeeze(1))  # type: ignore[no-untyped-call]

    def flops(self, seen: int, masked: int) -> int:  # noqa: ARG002
        """Operations of the one layer, which predicts every value."""
        return 2 * self.hidden_dim * self.embed_dim


class ValueTarget(Target):
    """The values of the image; the loss is computed on the "hidden" (masked) values or on "all" of them."""

    label = "pixels"

    def __init__(self, loss_on: str) -> None:
        super().__init__("values", 0)
        one_of("loss_on", loss_on, ("hidden", "all"))
        self.loss_on = loss_on

    def build_head(self, width: int) -> nn.Module:  # noqa: ARG002
        """An identity, because the decoder gives the predictions."""
        return nn.Identity()

    def hidden_values(self, images: Tensor, mask: ElementMask) -> Tensor:
        """(H,): the masked values of all images, one after the other."""
        return images.flatten(1)[mask.flags].float()

    def hidden_predictions(self, pred: Tensor, mask: ElementMask) -> Tensor:
        """(H,) float32: the predictions of the masked values."""
        return pred[mask.flags].float()

    def loss(self, pred: Tensor, images: Tensor, mask: ElementMask) -> Tensor:
        """The mean squared error, a scalar float32; 0 if nothing is masked."""
        error = (pred.float() - images.flatten(1).float()).square()
        if self.loss_on == "all":
            return error.mean()
        return (error * mask.flags).sum() / mask.flags.sum().clamp(min=1)

    def num_values(self, mask: ElementMask) -> int:
        """As `Target.num_values`."""
        return mask.flags.numel() if self.loss_on == "all" else int(mask.flags.sum())

    def visible_mean(self, images: Tensor, mask: ElementMask) -> Tensor:
        """(H,): for each masked value the mean of the visible values in the same image and channel."""
        visible = ~mask.removed_pixels((), images.shape[2:])
        axes = tuple(range(2, images.ndim))
        mean = (images * visible).sum(axes, keepdim=True) / visible.sum(axes, keepdim=True).clamp(min=1)
        return mean.expand_as(images).flatten(1)[mask.flags].float()

    def fill(self, images: Tensor, pred: Tensor, mask: ElementMask) -> tuple[Tensor, str]:
        """Images with the masked values as predicted."""
        filled = torch.where(mask.flags, pred.float(), images.flatten(1).float()).view(images.shape)
        return filled, "hidden values as predicted"


def compose(
    *, input_size: Sequence[int], in_chans: int, hidden_dim: int, output_relu: bool, loss_on: str
) -> MaskedAutoencoder:
    """The tutorial's model; see `FlatEncoder`, `FlatDecoder` and `ValueTarget` for the arguments."""
    encoder = FlatEncoder(input_size, in_chans, hidden_dim)
    decoder = FlatDecoder(hidden_dim, encoder.num_patches, output_relu=output_relu)
    return MaskedAutoencoder(encoder, decoder, [ValueTarget(loss_on)])
