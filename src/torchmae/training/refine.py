"""The second stage of pre-training: views of an image learn to be alike, while masked patches are still predicted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchmae.data.loader import Batch, View
from torchmae.data.transforms import CROP_NUMBERS, Normalisation, crop_boxes, resample, resample_valid
from torchmae.nn.contrast import Contrast
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.training.pretrain_task import PretrainSettings, PretrainTask
from torchmae.training.runtime import Runtime
from torchmae.training.task import Inputs, seeded


class Refined(nn.Module):
    """A masked autoencoder, and the contrast between what its encoder makes of two views' visible patches."""

    def __init__(self, model: MaskedAutoencoder, contrast: Contrast) -> None:
        super().__init__()
        self.model = model
        self.contrast = contrast

    def forward(self, images: Tensor, mask: Any, views: Tensor, ids_keep: Tensor) -> tuple[Tensor, ...]:
        """The sum of all losses, then each target's, then the contrast's.

        Args:
            images: (M, C, *size), of which patches are masked.
            mask: which ones.
            views: (B, 2, C, *size), two of each image.
            ids_keep: (B, 2, K) int64, each view's visible patches.
        """
        output = self.model(images, mask)
        seen = self.model.encoder(views.flatten(0, 1), ids_keep.flatten(0, 1))
        contrast = self.contrast(seen.patches.mean(1))
        return output.loss + contrast, *output.losses, contrast


def autoencoder_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The masked autoencoder's weights among those of a checkpoint, of either stage."""
    if all(name.startswith(("model.", "contrast.")) for name in weights):
        return {name.removeprefix("model."): weight for name, weight in weights.items() if name.startswith("model.")}
    return weights


class RefineTask(PretrainTask):
    """Goes on with a pre-trained model: `RefineConfig`.

    `view` says how images are cropped and whether they are mirrored, `normalisation` what their values mean.
    """

    def __init__(
        self,
        loop: PretrainSettings,
        model: MaskedAutoencoder,
        runtime: Runtime,
        batch_size: int,
        *,
        view: View,
        normalisation: Normalisation,
    ) -> None:
        self._view = view
        offset = torch.tensor(normalisation.mean) / torch.tensor(normalisation.std)
        self._offset = offset.view(-1, *[1] * len(view.input_size)).to(runtime.device)
        self._view_masker = Masker(model.encoder, ratio=loop.refine.mask_ratio)
        super().__init__(loop, model, runtime, batch_size)
        self.names = (*self.names, "contrast")

    def wrapped(self, model: MaskedAutoencoder) -> nn.Module:
        """As `PretrainTask.wrapped`."""
        with seeded(self.loop.seed):
            contrast = Contrast(model.encoder.embed_dim, self.loop.refine.temperature)
        return Refined(model, contrast.to(self.runtime.device))

    def inputs(self, batch: Batch, step: int, total: int) -> Inputs:
        """Images and their masks, of a part of the batch, and of each of its images two views and their masks."""
        del step
        few = batch.only(np.arange(math.ceil(self.loop.refine.masked_share * len(batch.images))))
        return *super().inputs(few, total - 1, total), *self._views(batch)

    def _views(self, batch: Batch) -> Inputs:
        """(B, 2, C, *size), and the visible patches of each, (B, 2, K)."""
        settings, count, size = self.loop.refine, 2 * len(batch.images), tuple(batch.images.shape[2:])
        images, valid = batch.images.repeat_interleave(2, 0), batch.valid
        boxes = crop_boxes(
            torch.rand(count, CROP_NUMBERS).numpy(), size, settings.crop_scale, self._view.crop_ratio, size
        )
        flip = torch.rand(count).numpy() < 0.5 if self._view.flip else np.zeros(count, dtype=bool)
        if valid is None:
            views = self._changed(resample(images, boxes, size, flip))
        else:
            images, valid = resample_valid(images, valid.repeat_interleave(2, 0), boxes, size, flip)
            views = torch.where(valid, self._changed(images), 0.0)
        epochs = 2 * np.repeat(batch.epoch, count if isinstance(batch.epoch, int) else 2) + np.arange(count) % 2
        masker = self._view_masker.for_images(views)
        masks = masker(self.loop.seed, epochs, batch.indices.repeat(2), views.device, valid)
        return tuple(part.view(count // 2, 2, *part.shape[1:]) for part in (views, masks.ids_keep))

    def _changed(self, images: Tensor) -> Tensor:
        return changed_colours(images, self._offset, self.loop.refine.colour, self.loop.refine.grey)

    def stand_in(self, inputs: Inputs) -> Inputs:
        """As `Task.stand_in`."""
        return *super().stand_in(inputs), *(item.new_zeros(1, *item.shape[1:]) for item in inputs[2:])

    def losses(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The sum of all losses, then each target's and the contrast's."""
        with self.runtime.autocast():
            loss, *each = self.forward(*inputs)
        return loss, *(item.detach() for item in each)


def changed_colours(images: Tensor, offset: Tensor, strength: float, grey: float) -> Tensor:
    """Changes each image's brightness, contrast, saturation and the balance of its channels at random.

    Images have any number of channels and axes; without colour, brightness and contrast change alone. Numbers are drawn
    from torch's generator.

    Args:
        images: (B, C, *size), normalised.
        offset: (C, 1, ...), what makes a multiple of the values before normalisation of them: mean over deviation.
        strength: 1 changes brightness, contrast and saturation by up to 40% and channels by up to 10%; 0: nothing.
        grey: share of the images whose channels all become their mean, in [0, 1].
    """
    rest = [1] * (images.ndim - 2)

    def factor(largest: float, channels: int = 1) -> Tensor:
        numbers = torch.rand(len(images), channels, *rest, device=images.device)
        return 1 + largest * strength * (2 * numbers - 1)

    values = (images + offset) * factor(0.4)
    mean = values.mean(dim=tuple(range(1, images.ndim)), keepdim=True)
    values = mean + (values - mean) * factor(0.4)
    plain = values.mean(dim=1, keepdim=True)
    is_grey = torch.rand(len(images), 1, *rest, device=images.device) < grey
    values = plain + (values - plain) * torch.where(is_grey, 0.0, factor(0.4))
    return values * factor(0.1, images.shape[1]) - offset
