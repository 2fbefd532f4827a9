"""The second stage of pre-training: views of an image learn to be alike, while masked patches are still predicted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchmae.data.loader import Batch, ImageLoader
from torchmae.data.transforms import CROP_NUMBERS, crop_boxes, resample, resample_valid, to_device
from torchmae.nn.contrast import Contrast
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.random import Purpose, uniform
from torchmae.training.pretrain_task import PretrainSettings, PretrainTask
from torchmae.training.runtime import Runtime
from torchmae.training.task import Inputs, seeded

COLOUR_NUMBERS = 4  # random numbers of a view's colours, beside one for each channel


class Refined(nn.Module):
    """A masked autoencoder with a contrastive loss between masked views of each image."""

    def __init__(self, model: MaskedAutoencoder, contrast: Contrast) -> None:
        super().__init__()
        self.model = model
        self.contrast = contrast

    def forward(self, images: Tensor, mask: Any, views: Tensor, ids_keep: Tensor) -> tuple[Tensor, ...]:
        """The sum of all losses, then each target's, then the contrast's.

        Args:
            images: (M, C, *size), of which patches are masked.
            mask: which ones.
            views: (B, V, C, *size), V of each image.
            ids_keep: (B, V, K) int64, each view's visible patches.
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
    """Trains a pre-trained model further, by the settings of `RefineConfig`.

    `loader` says how images are cropped, whether they are mirrored, and how they were normalised; None: not at all.
    """

    # A view is compared with those of its micro-batch alone, so smaller ones are other steps.
    fixes = PretrainTask.fixes._replace(out_of_memory=PretrainTask.fixes.out_of_memory_alone)

    def __init__(
        self,
        loop: PretrainSettings,
        model: MaskedAutoencoder,
        runtime: Runtime,
        batch_size: int,
        *,
        loader: ImageLoader | None,
    ) -> None:
        self._ratio, self._flip, offset = (1.0, 1.0), False, torch.zeros(model.encoder.in_chans)
        if loader is not None:
            self._ratio, self._flip = loader.view.crop_ratio, loader.view.flip
            mean, std = loader.normalisation.to_shown
            offset = mean / std
        self._offset = offset.view(-1, *[1] * len(model.patch_size)).to(runtime.device)
        self._view_masker = Masker(model.encoder, ratio=loop.refine.mask_ratio)
        super().__init__(loop, model, runtime, batch_size)
        self.names = (*self.names, "contrast")
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["peak_lr"] *= loop.refine.lr_ratio

    def wrapped(self, model: MaskedAutoencoder) -> nn.Module:
        """As `PretrainTask.wrapped`."""
        with seeded(self.loop.seed):
            contrast = Contrast(model.encoder.embed_dim, self.loop.refine.temperature, self.loop.refine.views)
        return Refined(model, contrast.to(self.runtime.device))

    def inputs(self, batch: Batch, step: int, total: int) -> Inputs:
        """Images and their masks, of a part of the batch, and views of each of its images and their masks."""
        del step
        few = batch.only(np.arange(math.ceil(self.loop.refine.masked_share * len(batch.images))))
        return *super().inputs(few, total - 1, total), *self._views(batch)

    def _views(self, batch: Batch) -> Inputs:
        """Views of each image, (B, V, C, *size), and the indices of their visible patches, (B, V, K)."""
        settings, size, valid = self.loop.refine, tuple(batch.images.shape[2:]), batch.valid
        images, indices = batch.images.repeat_interleave(settings.views, 0), batch.indices.repeat(settings.views)
        epochs = np.broadcast_to(batch.epoch, batch.indices.shape).repeat(settings.views) * settings.views
        drawn = self.loop.seed, epochs + np.arange(len(indices)) % settings.views, indices
        numbers = uniform(*drawn, Purpose.VIEW, CROP_NUMBERS + 1 + COLOUR_NUMBERS + images.shape[1])
        for_crop, for_flip, for_colours = np.split(numbers, (CROP_NUMBERS, CROP_NUMBERS + 1), axis=1)
        boxes = crop_boxes(for_crop, size, settings.crop_scale, self._ratio, size)
        flip = (for_flip[:, 0] < 0.5) & self._flip
        if valid is None:
            views = resample(images, boxes, size, flip)
        else:
            views, valid = resample_valid(images, valid.repeat_interleave(settings.views, 0), boxes, size, flip)
        colours = to_device(torch.from_numpy(for_colours), views.device)
        views = changed_colours(views, self._offset, colours, settings.colour, settings.grey)
        views = views if valid is None else torch.where(valid, views, 0.0)
        masks = self._view_masker.for_images(views)(*drawn, views.device, valid)
        return tuple(part.unflatten(0, (-1, settings.views)) for part in (views, masks.ids_keep))

    def stand_in(self, inputs: Inputs) -> Inputs:
        """As `Task.stand_in`."""
        return *super().stand_in(inputs), *(item.new_zeros(1, *item.shape[1:]) for item in inputs[2:])

    def losses(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The sum of all losses, then each target's and the contrast's."""
        with self.runtime.autocast():
            loss, *each = self.forward(*inputs)
        return loss, *(item.detach() for item in each)


def changed_colours(images: Tensor, offset: Tensor, numbers: Tensor, strength: float, grey: float) -> Tensor:
    """Changes each image's brightness, contrast, saturation and the balance of its channels.

    Images have any number of channels and axes; without colour, brightness and contrast change alone.

    Args:
        images: (B, C, *size), normalised.
        offset: (C, 1, ...), what added to a channel makes black 0.
        numbers: (B, COLOUR_NUMBERS + C), uniform in [0, 1).
        strength: 1 changes brightness, contrast and saturation by up to 40% and channels by up to 10%; 0: nothing.
        grey: share of the images whose channels all become their mean, in [0, 1].
    """
    numbers = numbers.unflatten(1, (-1, *[1] * (images.ndim - 2)))  # type: ignore[no-untyped-call]
    brightness, contrast, saturation, is_grey = numbers[:, :COLOUR_NUMBERS, None].unbind(1)
    channels = numbers[:, COLOUR_NUMBERS:]

    def factor(largest: float, drawn: Tensor) -> Tensor:
        return 1 + largest * strength * (2 * drawn - 1)

    values = (images + offset) * factor(0.4, brightness)
    mean = values.mean(dim=tuple(range(1, images.ndim)), keepdim=True)
    values = mean + (values - mean) * factor(0.4, contrast)
    plain = values.mean(dim=1, keepdim=True)
    values = plain + (values - plain) * torch.where(is_grey < grey, 0.0, factor(0.4, saturation))
    return values * factor(0.1, channels) - offset
