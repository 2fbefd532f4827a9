"""What training, evaluation and pictures ask of any masked autoencoder, whatever its mask looks like."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


class Reconstruction(NamedTuple):
    """A picture of what a model fills in.

    Attributes:
        images: (B, C, *size), the visible pixels as they were and the hidden ones as predicted.
        removed: (B, 1 or C, *size) bool, True where a pixel was hidden.
        note: how the target was undone; a viewer must show it, since it may use the hidden patches themselves.
    """

    images: Tensor
    removed: Tensor
    note: str


class Autoencoder(nn.Module, ABC):
    """A model that predicts what a mask hides. `mask` is whatever its own `draw_mask` gives, one for each image.

    Calling it with (images, mask) gives an output whose `loss` is a scalar float32.

    Attributes:
        norm_pix: whether its target is patches normalised by their own statistics.
    """

    norm_pix: bool

    @abstractmethod
    def noise_count(self, strategy: str, size: Sequence[int] | None = None) -> int:
        """Random numbers a mask takes for each sample; ConfigError for a strategy this model does not have.

        Args:
            strategy: how to hide.
            size: pixels along each axis; None: those trained on.
        """

    @abstractmethod
    def draw_mask(self, strategy: str, noise: Tensor, ratio: float, size: Sequence[int] | None = None) -> Any:
        """A mask from (B, `noise_count(strategy, size)`) uniform random numbers, for images of a size."""

    @abstractmethod
    def num_targets(self, mask: Any) -> int:
        """How many squared errors the loss averages."""

    @abstractmethod
    def removed_pixels(self, mask: Any) -> Tensor:
        """(B, 1 or C, *size) bool, True where a pixel is hidden; the size is the one trained on."""

    @abstractmethod
    def hidden_values(self, images: Tensor, mask: Any) -> Tensor:
        """The target where it is hidden."""

    @abstractmethod
    def hidden_predictions(self, output: Any) -> Tensor:
        """Float32: what of an output stands against `hidden_values`, value for value."""

    @abstractmethod
    def visible_mean(self, images: Tensor, mask: Any) -> Tensor:
        """The simplest prediction of `hidden_values`: a mean of what is visible in the image."""

    @abstractmethod
    def encode(self, images: Tensor, pool: str = "mean") -> Tensor:
        """(B, D) features of whole images; nothing is ever masked here."""

    @abstractmethod
    def reconstruct(self, images: Tensor, mask: Any) -> Reconstruction:
        """Fills in what is hidden and leaves the rest as it is."""
