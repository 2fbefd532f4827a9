"""The masked autoencoder: an encoder of visible patches, a decoder of masked ones, and targets to compare with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from torchmae.errors import ConfigError, one_of, within
from torchmae.nn.decoder import Decoder
from torchmae.nn.encoder import Encoder
from torchmae.nn.masking import evenly_spaced
from torchmae.nn.patches import patchify, unpatchify
from torchmae.nn.targets import Target

POOLS = ("mean", "cls", "both", "tokens")


class MAEOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        loss: scalar float32, the weighted sum of the targets' losses.
        pred: (B, M, P) predictions of the first target for the masked patches, in the order of `mask.ids_masked`.
        mask: the mask that was given; in training with `predict_ratio`, `ids_masked` names what was predicted.
        losses: each target's own loss, in the order of the model's `targets`; when the model is not in training mode,
            the first one's alone. Not detached: compiled, one loss of weight 1 and `loss` are the same tensor, and
            neither would have a gradient.
    """

    loss: Tensor
    pred: Tensor
    mask: Any
    losses: tuple[Tensor, ...]


class Reconstruction(NamedTuple):
    """A picture of what a model fills in.

    Attributes:
        images: (B, C, *size), the visible pixels as they were and the masked ones as predicted.
        removed: (B, 1 or C, *size) bool, True where a pixel was masked.
        note: how the target was undone; a viewer must show it, since it may use the masked patches themselves.
    """

    images: Tensor
    removed: Tensor
    note: str


class MaskedAutoencoder(nn.Module):
    """MAE (He et al. 2021), composed of built parts. Draws no random numbers: masks come from outside.

    Args:
        encoder: see `nn.encoder.Encoder`.
        decoder: see `nn.decoder.Decoder`.
        targets: the first is what predictions, pictures and held-out losses are of; the others count in training only.
        predict_ratio: share of the masked patches that training predicts, in (0, 1]; evaluation predicts all. Below 1
            for decoders whose predictions do not depend on each other (CrossMAE, Fu et al. 2024, section 3.3).

    Raises:
        ConfigError: a share outside (0, 1].
    """

    def __init__(
        self, encoder: Encoder, decoder: Decoder, targets: Sequence[Target], *, predict_ratio: float = 1.0
    ) -> None:
        super().__init__()
        within("predict_ratio", predict_ratio, 0, 1, open_low=True)
        self.encoder = encoder
        self.decoder = decoder
        self.targets = tuple(targets)
        self.predict_ratio = predict_ratio
        for target in self.targets[hasattr(decoder, "pred") :]:
            self.add_module(f"{target.name}_head", target.build_head(decoder.embed_dim))

    @property
    def target(self) -> Target:
        """The first target."""
        return self.targets[0]

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Pixels of a patch along each axis; empty for a model without patches."""
        return self.encoder.patch_size

    @property
    def pools(self) -> tuple[str, ...]:
        """The features of a whole image that `encode` has."""
        return ("mean", "cls", "both") if self.encoder.has_class_token else ("mean",)

    def forward(self, images: Tensor, mask: Any) -> MAEOutput:
        """Predicts the masked patches and compares them with the targets.

        Args:
            images: (B, C, *size) float, normalised as in training; a size other than the one trained on has its
                positions resampled. A pixel without data is 0.
            mask: which of their patches are masked.

        Raises:
            ConfigError: images of another number of channels or axes, or a mask of another batch or grid.
        """
        mask.check(len(images), prod(self.encoder.grid_of(images)))
        asked = {"keep_blocks": True} if self.decoder.reads_blocks else {}
        encoded = self.encoder(images, mask.ids_keep, **asked)
        mask = self.predicted(mask)
        tokens = self.decoder(encoded, mask)
        pred = self._head(0)(tokens)
        losses = [self.target.loss(pred, images, mask)]
        if self.training:
            others = enumerate(self.targets[1:], start=1)
            losses += [target.loss(self._head(i)(tokens), images, mask) for i, target in others]
        weighted = [target.weight * loss for target, loss in zip(self.targets, losses, strict=False)]
        return MAEOutput(cast(Tensor, sum(weighted)), pred, mask, tuple(losses))

    def predicted(self, mask: Any) -> Any:
        """The mask whose `ids_masked` are those that a forward pass predicts."""
        if not self.training or self.predict_ratio == 1:
            return mask
        return mask._replace(ids_masked=evenly_spaced(mask.ids_masked, self.predict_ratio))

    def encode(
        self, images: Tensor, pool: str = "mean", valid: Tensor | None = None, blocks: Sequence[int] | None = None
    ) -> Tensor:
        """Features of whole images; nothing is ever masked here, but a patch without data is not read.

        Args:
            images: (B, C, *size) float, normalised as in training.
            pool: "mean" of the patch tokens (B, D), the class token "cls" (B, D), "both" of them (B, 2 D), or all patch
                "tokens" (B, L, D).
            valid: (B, 1, *size) bool, False where a pixel holds no data; None: all do. The token of a patch without
                data is 0.
            blocks: numbers of the blocks whose outputs are concatenated along D, each standardised without learned
                scale and shift, the last one by the encoder's own norm; None: the last one.

        Raises:
            ConfigError: features that the model does not have.
        """
        one_of("pool", pool, POOLS)
        if pool == "tokens":
            require_patches(self, "for pool 'tokens'")
        elif pool not in self.pools:
            raise ConfigError(f"pool is {pool!r} but the model has no class token", "use 'mean' or 'tokens'")
        parts = [] if valid is None or not self.patch_size else list(patches_with_data(valid, self.patch_size))
        if parts:
            found = [self._features(images[rows], pool, blocks, ids) for rows, ids in parts]
            if pool == "tokens":
                length = prod(self.encoder.grid_of(images))
                found = [
                    tokens.new_zeros(len(tokens), length, tokens.shape[2]).scatter(
                        1, ids[..., None].expand_as(tokens), tokens
                    )
                    for tokens, (_, ids) in zip(found, parts, strict=True)
                ]
            return torch.cat(found)[torch.cat([rows for rows, _ in parts]).argsort()]
        return self._features(images, pool, blocks)

    def _features(self, images: Tensor, pool: str, blocks: Sequence[int] | None, ids: Tensor | None = None) -> Tensor:
        encoded = self.encoder(images, ids) if blocks is None else self.encoder.at_blocks(images, blocks, ids)
        if pool == "tokens":
            return encoded.patches
        found = {"mean": [encoded.patches.mean(1)], "cls": [encoded.prefix[:, :1].squeeze(1)]}
        return torch.cat(found["mean"] + found["cls"], 1) if pool == "both" else found[pool][0]

    def reconstruct(self, images: Tensor, mask: Any) -> Reconstruction:
        """Fills in the masked patches and leaves the visible ones as they are. Arguments as for `forward`."""
        filled, note = self.target.fill(images, self(images, mask).pred, mask)
        if getattr(mask, "valid", None) is not None:
            grid = self.encoder.grid_of(images)
            filled = torch.where(unpatchify(mask.valid, self.patch_size, grid), filled, 0.0)
        return Reconstruction(filled, mask.removed_pixels(self.patch_size, images.shape[2:]), note)

    def _head(self, number: int) -> nn.Module:
        """From the decoder's tokens to the predictions of a target."""
        if number == 0 and hasattr(self.decoder, "pred"):
            return cast(nn.Module, self.decoder.pred)
        return self.get_submodule(f"{self.targets[number].name}_head")


def patches_with_data(valid: Tensor, patch_size: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Images with equally many patches that hold data: their rows (B,), and the indices (B, K) of these patches.

    `valid` is (N, 1, *size) bool. Nothing where all patches hold data; an image without any has all of its patches.
    """
    has_data = patchify(valid, patch_size).any(-1)
    has_data |= ~has_data.any(1, keepdim=True)
    counts = has_data.sum(1)
    for count in [] if bool(has_data.all()) else sorted(set(counts.tolist())):
        rows = (counts == count).nonzero().flatten()
        yield rows, has_data[rows].nonzero()[:, 1].view(len(rows), count)


def require_patches(model: MaskedAutoencoder, purpose: str) -> None:
    """ConfigError for a model whose encoder has no patches; `purpose` says what for."""
    if not model.patch_size:
        raise ConfigError(f"this model has no patches {purpose}", "use a vit model")


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Trained values in the encoder and in the rest of the model."""
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    encoder = sum(p.numel() for name, p in model.named_parameters() if name.startswith("encoder") and p.requires_grad)
    return encoder, total - encoder


def no_weight_decay(name: str, parameter: Tensor) -> bool:
    """Whether weight decay leaves a parameter alone: biases, norms, class, register and mask tokens.

    Departure: the official code decays class and mask tokens.
    """
    return parameter.ndim <= 1 or name.rpartition(".")[2] in ("cls_token", "reg_token", "mask_token")
