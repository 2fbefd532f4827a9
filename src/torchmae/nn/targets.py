"""Targets: what a model predicts of the masked patches, and how predictions are compared and shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from torchmae.errors import ConfigError
from torchmae.nn.gradients import BINS, oriented_gradients
from torchmae.nn.layers import init_linear
from torchmae.nn.masking import Mask
from torchmae.nn.patches import gather, patch_statistics, patchify, unpatchify


class Target(ABC):
    """Values that a model predicts for each masked patch. A subclass has `hidden_values`, and what differs from here.

    Masks are `Mask`s here; the masks of an encoder without patches are what its own strategies and target agree on.

    Args:
        name: of its loss in the logs, and of its head in the state_dict (`<name>_head`).
        dim: values for each patch, P.
        weight: of its loss in the sum of all targets' losses, above 0.

    Attributes:
        label: what is predicted, in words.
        norm_pix: the values are normalised by the statistics of their own patch.
    """

    label = ""
    norm_pix = False

    def __init__(self, name: str, dim: int, weight: float = 1.0) -> None:
        self.name = name
        self.dim = dim
        self.weight = weight

    def build_head(self, width: int) -> nn.Module:
        """A fresh module from a decoder's tokens (B, M, width) to predictions (B, M, P)."""
        head = nn.Linear(width, self.dim)
        init_linear(head)
        return head

    @abstractmethod
    def hidden_values(self, images: Tensor, mask: Any) -> Tensor:
        """(B, M, P) float32: the true values of the masked patches, in the order of `mask.ids_masked`."""

    def hidden_predictions(self, pred: Tensor, mask: Any) -> Tensor:  # noqa: ARG002
        """Float32: the part of a prediction that stands against `hidden_values`, value for value."""
        return pred.float()

    def weights(self, mask: Any) -> Tensor | None:
        """How much each of `hidden_values` counts, 0 to 1, (B, M, 1) or (B, M, P) float32; None: all of them, alike.

        Here a patch counts by the share of its pixels that hold data.
        """
        if getattr(mask, "valid", None) is None:
            return None
        return gather(mask.valid, mask.ids_masked).float().mean(-1, keepdim=True)

    def loss(self, pred: Tensor, images: Tensor, mask: Any) -> Tensor:
        """The mean squared error, a scalar float32; 0 where nothing counts."""
        guess, values = self.hidden_predictions(pred, mask), self.hidden_values(images, mask)
        weights = self.weights(mask)
        if weights is None:
            return F.mse_loss(guess, values)
        weights = weights.expand_as(values)
        return ((guess - values).square() * weights).sum() / weights.sum().clamp(min=1)

    def num_values(self, mask: Any) -> int:
        """Number of values that the loss is the mean of; weights the losses of micro-batches."""
        weights = self.weights(mask)
        shape = (*mask.ids_masked.shape, self.dim)
        return prod(shape) if weights is None else round(weights.double().expand(shape).sum().item())

    def visible_mean(self, images: Tensor, mask: Any) -> Tensor:
        """The simplest prediction, which takes no learning: the mean over an image's visible patches, (B, 1, P)."""
        visible = Mask(mask.ids_masked, mask.ids_keep, mask.valid)
        values, weights = self.hidden_values(images, visible), self.weights(visible)
        if weights is None:
            return values.mean(1, keepdim=True)
        weights = weights.expand_as(values)
        return (values * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)

    def fill(self, images: Tensor, pred: Tensor, mask: Any) -> tuple[Tensor, str]:  # noqa: ARG002
        """Images (B, C, *size) whose masked pixels are the predicted ones, and a note on how the target was undone.

        Raises:
            ConfigError: predictions of this target cannot be shown as pixels.
        """
        raise ConfigError(f"the model predicts {self.label}, which are no picture", "train with --model.target pixels")


class PixelTarget(Target):
    """The pixels of each patch (paper section 3), or pixels normalised by the patch's mean and deviation (section 4.1).

    Args:
        patch_size: pixels of a patch along each axis.
        in_chans: channels.
        norm_pix: normalise.

    Raises:
        ConfigError: patches of one value, which cannot be normalised.
    """

    def __init__(self, patch_size: Sequence[int], in_chans: int, *, norm_pix: bool = True) -> None:
        super().__init__("pixels", prod(patch_size) * in_chans)
        if norm_pix and self.dim < 2:
            raise ConfigError("norm_pix needs 2 values in a patch to normalise, found 1", "turn norm_pix off")
        self.patch_size = tuple(patch_size)
        self.norm_pix = norm_pix
        self.label = "normalised patches" if norm_pix else "pixels"

    def hidden_values(self, images: Tensor, mask: Mask) -> Tensor:
        """(B, M, P) float32: the masked patches, channels last within a patch."""
        patches = gather(patchify(images, self.patch_size), mask.ids_masked).float()
        if not self.norm_pix:
            return patches
        mean, std = patch_statistics(patches, self.weights(mask))
        return (patches - mean) / std

    def weights(self, mask: Mask) -> Tensor | None:
        """(B, M, P) float32: 1 for the values of pixels that hold data, 0 for the others."""
        if mask.valid is None:
            return None
        channels = self.dim // prod(self.patch_size)
        return gather(mask.valid, mask.ids_masked).repeat_interleave(channels, -1).float()

    def fill(self, images: Tensor, pred: Tensor, mask: Mask) -> tuple[Tensor, str]:
        """Images with the masked patches as predicted; the true mean and deviation undo the normalisation."""
        patches, pred = patchify(images, self.patch_size), pred.float()
        note = "masked patches as predicted"
        if self.norm_pix:
            mean, std = patch_statistics(gather(patches, mask.ids_masked), self.weights(mask))
            pred = pred * std + mean
            note = "masked patches as predicted, with the true mean and contrast of each patch put back"
        pasted = patches.scatter(1, mask.ids_masked.unsqueeze(-1).expand_as(pred), pred.to(patches.dtype))
        grid = [pixels // patch for pixels, patch in zip(images.shape[2:], self.patch_size, strict=True)]
        return unpatchify(pasted, self.patch_size, grid), note


class HogTarget(Target):
    """Histograms of oriented gradients (MaskFeat, Wei et al. 2022).

    Args:
        patch_size: height and width of a patch in pixels.
        in_chans: channels.
        weight: of the loss.

    Raises:
        ConfigError: patches of other than 2 axes.
    """

    label = "gradient histograms"

    def __init__(self, patch_size: Sequence[int], in_chans: int, weight: float = 1.0) -> None:
        super().__init__("hog", in_chans * BINS, weight)
        if len(patch_size) != 2:
            raise ConfigError(f"hog_weight needs images with 2 axes, found {len(patch_size)}", "use hog_weight 0")
        self.patch_size = tuple(patch_size)

    def hidden_values(self, images: Tensor, mask: Mask) -> Tensor:
        """(B, M, C * BINS) float32."""
        return gather(oriented_gradients(images, self.patch_size), mask.ids_masked)
