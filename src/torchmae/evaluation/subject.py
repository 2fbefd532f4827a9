"""What is evaluated: a trained model, the same network untrained, or the pixels themselves, all by the same code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchmae.config.evaluate import Layer
from torchmae.data.loader import Batch
from torchmae.data.sources import digest
from torchmae.errors import ConfigError
from torchmae.evaluation.scores import Labelled
from torchmae.nn.encoder import Encoder
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.patches import patchify
from torchmae.training.runtime import Runtime
from torchmae.training.task import seeded

RANDOM = "random"
PIXELS = "pixels"

# By the number of axes: the largest side of an image as features. Ten thousand photographs in full take gigabytes.
_PIXEL_SIDE = {1: 1024, 2: 32, 3: 10}
_POOL: dict[int, Callable[..., Tensor]] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


@dataclass(frozen=True)
class Subject:
    """A source of features, called "model", "random" or "pixels"; pixels have no model but a `patch_size` to cut.

    `blocks` are the numbers of the encoder's blocks that features are of (`blocks_of`); None: its output.
    """

    name: str
    model: MaskedAutoencoder | None
    patch_size: tuple[int, ...] = ()
    blocks: tuple[int, ...] | None = None

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
        `MaskedAutoencoder.encode`. Pixels give all values of an image, averaged down to at most 32 x 32 (1,024 on one
        axis, 10 x 10 x 10 on three).

        Raises:
            ConfigError: the subject does not have these features.
        """
        if self.model is not None:
            return self.model.encode(images, pool, valid, self.blocks)
        if pool != "mean":
            raise ConfigError(f"pool is {pool!r} but pixels have no tokens", "leave --pool out")
        axes = images.ndim - 2
        size = [min(side, _PIXEL_SIDE[axes]) for side in images.shape[2:]]
        return (images if list(images.shape[2:]) == size else _POOL[axes](images, size)).flatten(1)

    def patch_tokens(self, images: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, L, D), as of `encode` with "tokens"; of pixels, those of each patch."""
        return patchify(images, self.patch_size) if self.model is None else self.encode(images, "tokens", valid)

    def fingerprint(self) -> str:
        """A digest of the weights; empty for pixels."""
        if self.model is None:
            return ""
        weights = self.model.state_dict()
        return digest(part for name in sorted(weights) for part in (name, weights[name].cpu().numpy().tobytes()))


def blocks_of(encoder: Encoder, layer: Layer | None) -> tuple[int, ...] | None:
    """The numbers of the blocks that the option `layer` means; ConfigError for more than there are."""
    if layer is None:
        return None
    depth = len(encoder.blocks) if encoder.gives_blocks else 1
    blocks = [int(layer)] if isinstance(layer, int) else range(-int(layer.removeprefix("last-")), 0)
    if not all(-depth <= number < depth for number in blocks):
        what = "block" if depth == 1 else "blocks"
        raise ConfigError(
            f"layer is {layer!r} and this {encoder.label} gives {depth} {what}",
            f"choose from {-depth} to {depth - 1}, or at most last-{depth}",
        )
    return tuple(number % depth for number in blocks) if encoder.gives_blocks else None


class Encoded(NamedTuple):
    """Of each batch: features (B, D) float32, labels (-1 where unknown) and the numbers of the images, both int64."""

    features: list[Tensor]
    labels: list[Tensor]
    rows: list[Tensor]


def encode(subject: Subject, batches: Iterable[Batch], runtime: Runtime, pool: str = "mean") -> Encoded:
    """Features, as of `Subject.encode`, of all batches; puts the model into eval mode."""
    if subject.model is not None:
        subject.model.eval()
    encoded = Encoded([], [], [])
    for batch in batches:
        with runtime.autocast():
            encoded.features.append(subject.encode(batch.images, pool, batch.valid).float())
        encoded.labels.append(batch.labels)
        encoded.rows.append(torch.from_numpy(batch.indices).to(batch.labels.device))
    return encoded


def extract(subject: Subject, batches: Iterable[Batch], runtime: Runtime, pool: str = "mean") -> Labelled:
    """Features and labels, as of `encode`, of all batches."""
    features, labels, _ = encode(subject, batches, runtime, pool)
    return Labelled(torch.cat(features), torch.cat(labels))


def untrained(
    make: Callable[[], MaskedAutoencoder], seed: int, device: torch.device, layer: Layer | None = None
) -> Subject:
    """The network that `make` builds, with weights from `seed`. torch's generator stays as it is."""
    with seeded(seed):
        model = make()
    return network(RANDOM, model, device, layer)


def network(name: str, model: MaskedAutoencoder, device: torch.device, layer: Layer | None) -> Subject:
    """A model, moved to the device, whose features are those of `layer`; ConfigError as of `blocks_of`."""
    return Subject(name, model.to(device).eval(), blocks=blocks_of(model.encoder, layer))


def pixels(patch_size: tuple[int, ...] = ()) -> Subject:
    """Raw pixels, the baseline that a model has to beat."""
    return Subject(PIXELS, None, patch_size)
