"""Reconstruction loss and explained variance, beside baselines without learning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchmae.evaluation.inpainting import interpolate
from torchmae.evaluation.scores import exact
from torchmae.evaluation.sharing import Share
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.training.runtime import Runtime


class HoldOut:
    """Figures on held-out images under fixed masks.

    Two baselines stand beside the model: the mean of each image's visible patches, and `inpainting.interpolate`. All
    are compared in the space of the model's target. For a normalised target, the interpolated patch is normalised by
    its own statistics and scaled by the factor, at least 0, with the smallest loss: its most favourable reading.

    Args:
        model: the model to measure; `run` reads its weights anew.
        batches: images (B, C, *size) and their masks, the same at each iteration.
        runtime: where to compute.
        share: `batches` are this rank's share; all ranks call the same methods and get figures of all images.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        batches: Iterable[tuple[Tensor, Any]],
        runtime: Runtime,
        share: Share | None = None,
    ) -> None:
        self._model = model
        self._batches = batches
        self._runtime = runtime
        self._share = share
        found = []
        for images, mask in batches:
            target = exact(model.target.hidden_values(images, mask))
            weights = self._weights(mask, target)
            removed = mask.removed_pixels(model.patch_size, images.shape[2:])
            guess = exact(model.target.hidden_values(interpolate(images, removed), mask))
            means = exact(model.target.visible_mean(images, mask))
            sums = (weights, target, target.square(), (means - target).square(), guess.square(), guess * target)
            found.append(tuple((values * weights).sum().item() for values in sums))
        count, total, square, mean_patch, guess_square, guess_target = self._totals(found)
        scale = max(guess_target / guess_square, 0.0) if model.target.norm_pix and guess_square > 0 else 1.0
        self.variance = max(square / count - (total / count) ** 2, 1e-12)
        self.loss_mean_patch = mean_patch / count
        self.loss_interpolation = (square - 2 * scale * guess_target + scale**2 * guess_square) / count

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """Mean squared errors on the masked values: loss, loss_mean_patch, loss_interpolation.

        explained_variance and explained_variance_interpolation are 1 - loss / variance of the masked values: 0 for
        a constant, 1 for a perfect prediction.
        """
        self._model.eval()
        found = []
        for images, mask in self._batches:
            with self._runtime.autocast():
                output = self._model(images, mask)
            target = self._model.target
            guess = exact(target.hidden_predictions(output.pred, mask))
            error = guess - exact(target.hidden_values(images, mask))
            weights = self._weights(mask, error)
            found.append(((error.square() * weights).sum().item(), weights.sum().item()))
        total, count = self._totals(found)
        loss = total / count
        return {
            "loss": loss,
            "loss_mean_patch": self.loss_mean_patch,
            "loss_interpolation": self.loss_interpolation,
            "explained_variance": 1 - loss / self.variance,
            "explained_variance_interpolation": 1 - self.loss_interpolation / self.variance,
        }

    def _weights(self, mask: Any, values: Tensor) -> Tensor:
        """How much each of the hidden values counts, 0 to 1."""
        weights = self._model.target.weights(mask)
        return torch.ones_like(values) if weights is None else exact(weights).expand_as(values)

    def _totals(self, found: Sequence[tuple[float, ...]]) -> list[float]:
        """Sums over the batches of all ranks, added up in the order of a single rank."""
        of_all = found if self._share is None else self._share.of_all_batches(found)
        return [sum(column) for column in zip(*of_all, strict=True)]
