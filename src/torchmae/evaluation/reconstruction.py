"""How good a reconstruction is, beside predictions that take no learning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchmae.evaluation.inpainting import interpolate
from torchmae.nn.autoencoder import Autoencoder
from torchmae.training.runtime import Runtime


class HoldOut:
    """Figures on held-out images under fixed masks.

    Two predictors that need no learning stand beside the model: the mean of each image's visible patches, and smooth
    interpolation from the visible pixels (`inpainting.interpolate`). All are compared in the space of the model's
    target. For a normalised target the interpolated patch is normalised by its own statistics and scaled by the
    single factor, at least 0, that makes its loss smallest: the kindest reading of it.

    Args:
        model: the model to measure, as it will be when called.
        batches: images (B, C, *size) and their masks.
        runtime: where to compute.
    """

    def __init__(
        self,
        model: Autoencoder,
        batches: Sequence[tuple[Tensor, Any]],
        runtime: Runtime,
    ) -> None:
        self._model = model
        self._batches = batches
        self._runtime = runtime
        count, total, square, mean_patch, guess_square, guess_target = 0, 0.0, 0.0, 0.0, 0.0, 0.0
        for images, mask in batches:
            target = model.hidden_values(images, mask).double()
            guess = model.hidden_values(interpolate(images, model.removed_pixels(mask)), mask).double()
            count += target.numel()
            total += target.sum().item()
            square += target.square().sum().item()
            mean_patch += (model.visible_mean(images, mask).double() - target).square().sum().item()
            guess_square += guess.square().sum().item()
            guess_target += (guess * target).sum().item()
        scale = max(guess_target / guess_square, 0.0) if model.norm_pix and guess_square > 0 else 1.0
        self.variance = max(square / count - (total / count) ** 2, 1e-12)
        self.loss_mean_patch = mean_patch / count
        self.loss_interpolation = (square - 2 * scale * guess_target + scale**2 * guess_square) / count

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """Measures the model as it is now.

        Returns:
            loss, loss_mean_patch, loss_interpolation (mean squared errors on hidden values), explained_variance and
            explained_variance_interpolation: 1 - loss / variance of the hidden values, 0 for a constant, 1 for
            perfection.
        """
        self._model.eval()
        total, count = 0.0, 0
        for images, mask in self._batches:
            with self._runtime.autocast():
                output = self._model(images, mask)
            error = self._model.hidden_predictions(output).double() - self._model.hidden_values(images, mask)
            total += error.square().sum().item()
            count += error.numel()
        loss = total / count
        return {
            "loss": loss,
            "loss_mean_patch": self.loss_mean_patch,
            "loss_interpolation": self.loss_interpolation,
            "explained_variance": 1 - loss / self.variance,
            "explained_variance_interpolation": 1 - self.loss_interpolation / self.variance,
        }
