"""What is evaluated: a trained model, the same network untrained, or the pixels themselves, all by the same code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchmae import presets
from torchmae.data.loader import Batch
from torchmae.data.sources import digest
from torchmae.errors import ConfigError
from torchmae.evaluation.scores import Labelled
from torchmae.evaluation.sharing import Share
from torchmae.nn.mae import MaskedAutoencoder, require_patches
from torchmae.nn.patches import patchify
from torchmae.training.runtime import Runtime

RANDOM = "random"
PIXELS = "pixels"

# By the number of axes: the largest side of an image as features. Ten thousand photographs in full take gigabytes.
_PIXEL_SIDE = {1: 1024, 2: 32, 3: 10}
_POOL: dict[int, Callable[..., Tensor]] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


@dataclass(frozen=True)
class Subject:
    """A source of features, called "model", "random" or "pixels"; pixels have no model but a `patch_size` to cut."""

    name: str
    model: MaskedAutoencoder | None
    patch_size: tuple[int, ...] = ()

    @property
    def pools(self) -> tuple[str, ...]:
        """Its kinds of features: some of "mean", "cls" and "both"."""
        return ("mean",) if self.model is None else self.model.pools

    @property
    def has_tokens(self) -> bool:
        """Whether it has a feature for each patch."""
        return self.model is not None and bool(self.model.patch_size)

    @torch.no_grad()
    def encode(self, images: Tensor, pool: str, valid: Tensor | None = None) -> Tensor:
        """Features of normalised (B, C, *size) float32 images without a mask: (B, D), or (B, L, D) with "tokens".

        `pool` is one of `pools`, or "tokens" where `has_tokens`; "both" is "mean" followed by "cls"; `valid` is as in
        `MaskedAutoencoder.encode`. Pixels give all
        values of an image, averaged down to at most 32 x 32 (1,024 on one axis, 10 x 10 x 10 on three).

        Raises:
            ConfigError: the subject does not have these features.
        """
        if self.model is not None:
            return self.model.encode(images, pool, valid)
        if pool != "mean":
            raise ConfigError(f"pool is {pool!r} but pixels have no tokens", "leave --pool out")
        axes = images.ndim - 2
        size = [min(side, _PIXEL_SIDE[axes]) for side in images.shape[2:]]
        return (images if list(images.shape[2:]) == size else _POOL[axes](images, size)).flatten(1)

    @torch.no_grad()
    def patch_tokens(self, images: Tensor, blocks: int = 1) -> Tensor:
        """(B, L, D): of each patch, the outputs of the last `blocks` blocks one after the other, or its pixels.

        Raises:
            ConfigError: no patches, or fewer blocks.
        """
        if self.model is None:
            return patchify(images, self.patch_size)
        if blocks == 1:
            return self.model.encode(images, "tokens")
        require_patches(self.model, "for segmentation.blocks")
        encoder = self.model.encoder
        depth = len(encoder.blocks) if encoder.gives_blocks else 1
        if blocks > depth:
            raise ConfigError(
                f"segmentation.blocks is {blocks} and this {encoder.label} gives {depth}", f"at most {depth}"
            )
        output = encoder(images, keep_blocks=True)
        before = (block[:, encoder.num_prefix_tokens :] for block in output.blocks[-blocks:-1])
        return torch.cat([*(F.layer_norm(block, block.shape[-1:]) for block in before), output.patches], dim=-1)

    def fingerprint(self) -> str:
        """A digest of the weights; empty for pixels."""
        if self.model is None:
            return ""
        weights = self.model.state_dict()
        return digest(part for name in sorted(weights) for part in (name, weights[name].cpu().numpy().tobytes()))


def extract(
    subject: Subject, batches: Iterable[Batch], runtime: Runtime, pool: str = "mean", share: Share | None = None
) -> Labelled:
    """Features, as of `Subject.encode`, and labels (-1 where unknown) of all batches; puts the model into eval mode.

    With `share`, `batches` are this rank's part of the images, and all ranks get the features of all images.
    """
    if subject.model is not None:
        subject.model.eval()
    features, labels = [], []
    for batch in batches:
        with runtime.autocast():
            features.append(subject.encode(batch.images, pool, batch.valid).float())
        labels.append(batch.labels)
    if share is None:
        return Labelled(torch.cat(features), torch.cat(labels))
    return Labelled(*share.of_all_images(features, labels))


def untrained(
    arguments: dict[str, Any], seed: int, device: torch.device, own: MaskedAutoencoder | None = None
) -> Subject:
    """A network with fresh weights, drawn without a change of torch's generator; or a copy of `own` with its weights.

    `arguments` are those of `presets.construct`.
    """
    if own is not None:
        return Subject(RANDOM, copy.deepcopy(own).to(device).eval())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed GPUs too
        model = presets.construct(arguments)
    return Subject(RANDOM, model.to(device).eval())


def pixels(patch_size: tuple[int, ...] = ()) -> Subject:
    """Raw pixels, the baseline that a model has to beat."""
    return Subject(PIXELS, None, patch_size)
