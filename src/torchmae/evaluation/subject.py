"""What is evaluated: a trained model, the same network untrained, or the pixels themselves, all by the same code."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchmae import presets
from torchmae.data.loader import Batch
from torchmae.data.sources import digest
from torchmae.errors import ConfigError
from torchmae.evaluation.features import shrink
from torchmae.evaluation.scores import Labelled
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.training.runtime import Runtime

RANDOM = "random"
PIXELS = "pixels"


@dataclass(frozen=True)
class Subject:
    """A source of features.

    Attributes:
        name: "model", "random" or "pixels".
        model: the network, in eval mode; None for pixels.
    """

    name: str
    model: MaskedAutoencoder | None

    @property
    def pools(self) -> tuple[str, ...]:
        """The kinds of features it has, of "mean", "cls" and "both"."""
        return ("mean",) if self.model is None else self.model.pools

    @property
    def has_tokens(self) -> bool:
        """Whether it has a feature for each patch."""
        return self.model is not None and bool(self.model.patch_size)

    @torch.no_grad()
    def encode(self, images: Tensor, pool: str) -> Tensor:
        """Features of whole images; nothing is masked.

        Args:
            images: (B, C, *size) float32, normalised.
            pool: one of `pools`, or "tokens" where there are any. "both" is "mean" and then "cls".

        Returns:
            (B, D), or (B, L, D) with "tokens".

        Raises:
            ConfigError: features that it does not have.
        """
        if self.model is None:
            if pool != "mean":
                raise ConfigError(f"pool is {pool!r} but pixels have no tokens", "leave --pool out")
            return shrink(images).flatten(1)
        return self.model.encode(images, pool)

    def fingerprint(self) -> str:
        """A digest of the weights; empty for pixels."""
        if self.model is None:
            return ""
        weights = self.model.state_dict()
        return digest(part for name in sorted(weights) for part in (name, weights[name].cpu().numpy().tobytes()))


def extract_features(subject: Subject, batches: Iterable[Batch], runtime: Runtime, pool: str) -> Labelled:
    """Features and labels of all batches, on the device; arguments as for `Subject.encode`."""
    features, labels = [], []
    for batch in batches:
        with runtime.autocast():
            features.append(subject.encode(batch.images, pool).float())
        labels.append(batch.labels)
    return Labelled(torch.cat(features), torch.cat(labels))


def untrained(
    arguments: dict[str, Any], seed: int, device: torch.device, own: MaskedAutoencoder | None = None
) -> Subject:
    """The network of `presets.construct` arguments with fresh weights; torch's own generator is left alone.

    A model handed over in Python, `own`, is taken with the weights that it has.
    """
    if own is not None:
        return Subject(RANDOM, copy.deepcopy(own).to(device).eval())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed GPUs too
        model = presets.construct(arguments)
    return Subject(RANDOM, model.to(device).eval())


def pixels() -> Subject:
    """Raw pixels, averaged down to 32 x 32 where there are more."""
    return Subject(PIXELS, None)
