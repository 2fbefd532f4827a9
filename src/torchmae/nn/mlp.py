"""The tutorial's autoencoder: fully connected, one hidden layer, every value of the image masked on its own.

The tutorial's own choices (`output_relu=True`, `loss_on="all"`, and the inverted mask of `masking.elements_mask`) are
kept as they are, to be run and measured; the other choices are what its text describes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchmae.errors import ConfigError, one_of
from torchmae.nn.autoencoder import Autoencoder, Reconstruction
from torchmae.nn.masking import elements_mask

STRATEGIES = ("elements", "elements_inverted")


class MLPOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        loss: scalar float32, mean squared error.
        pred: (B, N) predictions of all values.
        mask: (B, N) bool, the mask that was given.
    """

    loss: Tensor
    pred: Tensor
    mask: Tensor


class MLPAutoencoder(Autoencoder):
    """Z = ReLU(W_e (X * M) + b_e); the prediction is W_d Z + b_d, through a ReLU or not. X is the flattened image.

    Args:
        input_size: pixels along each axis.
        in_chans: channels.
        hidden_dim: width of Z.
        output_relu: end in a ReLU; targets below zero are then out of reach.
        loss_on: "hidden" values only, or "all" of them.
    """

    norm_pix = False

    def __init__(
        self, *, input_size: Sequence[int], in_chans: int, hidden_dim: int, output_relu: bool, loss_on: str
    ) -> None:
        super().__init__()
        one_of("loss_on", loss_on, ("hidden", "all"))
        self.shape = (in_chans, *input_size)
        self.loss_on = loss_on
        width = prod(self.shape)
        self.encoder = nn.Sequential(nn.Linear(width, hidden_dim), nn.ReLU())
        self.decoder = nn.Sequential(nn.Linear(hidden_dim, width), nn.ReLU() if output_relu else nn.Identity())

    def forward(self, images: Tensor, mask: Tensor) -> MLPOutput:
        """Predicts every value and compares.

        Args:
            images: (B, C, *size) float.
            mask: (B, C * prod(size)) bool, True where a value is removed (set to zero).
        """
        x = self._flat(images)
        pred = self.decoder(self.encoder(x.masked_fill(mask, 0)))
        error = (pred.float() - x.float()).square()
        loss = error.mean() if self.loss_on == "all" else (error * mask).sum() / mask.sum().clamp(min=1)
        return MLPOutput(loss, pred, mask)

    def encode(self, images: Tensor, pool: str = "mean") -> Tensor:
        """(B, hidden_dim): Z of whole images; nothing is masked. There are no tokens, so `pool` can only be "mean"."""
        if pool != "mean":
            raise ConfigError(f"pool is {pool!r} but the mlp model has no tokens", "use 'mean'")
        return self.encoder(self._flat(images))

    def reconstruct(self, images: Tensor, mask: Tensor) -> Reconstruction:
        """Fills in the hidden values and leaves the visible ones as they are. Arguments as for `forward`."""
        pred = self(images, mask).pred.float()
        filled = torch.where(mask, pred, images.flatten(1).float()).view(images.shape)
        return Reconstruction(filled, self.removed_pixels(mask), "hidden values as predicted")

    def draw_mask(self, strategy: str, noise: Tensor, ratio: float, size: Sequence[int] | None = None) -> Tensor:  # noqa: ARG002
        """(B, N) bool from (B, N) uniform random numbers; images have one size here."""
        one_of("mask.strategy", strategy, STRATEGIES)
        return elements_mask(noise, ratio, inverted=strategy == "elements_inverted")

    def noise_count(self, strategy: str, size: Sequence[int] | None = None) -> int:  # noqa: ARG002
        """Random numbers a mask takes for each sample; ConfigError for a strategy that hides patches."""
        one_of("mask.strategy", strategy, STRATEGIES)
        return prod(self.shape)

    def num_targets(self, mask: Tensor) -> int:
        """How many values the loss averages over."""
        return mask.numel() if self.loss_on == "all" else int(mask.sum())

    def removed_pixels(self, mask: Tensor) -> Tensor:
        """(B, C, *size) bool, True where a value is hidden."""
        return mask.view(-1, *self.shape)

    def hidden_values(self, images: Tensor, mask: Tensor) -> Tensor:
        """(H,): the hidden values of all images, one after the other."""
        return images.flatten(1)[mask].float()

    def hidden_predictions(self, output: MLPOutput) -> Tensor:
        """(H,) float32: what of a forward pass stands against `hidden_values`."""
        return output.pred[output.mask].float()

    def visible_mean(self, images: Tensor, mask: Tensor) -> Tensor:
        """(H,): for each hidden value the mean of its image's visible ones in the same channel."""
        visible = ~self.removed_pixels(mask)
        axes = tuple(range(2, images.ndim))
        mean = (images * visible).sum(axes, keepdim=True) / visible.sum(axes, keepdim=True).clamp(min=1)
        return mean.expand_as(images).flatten(1)[mask].float()

    def _flat(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self.shape:
            wanted = ", ".join(str(size) for size in self.shape)
            raise ConfigError(f"images have shape {tuple(images.shape)}", f"this model takes (batch, {wanted})")
        return images.flatten(1)
