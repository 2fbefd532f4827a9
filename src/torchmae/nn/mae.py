"""The masked autoencoder: an encoder of visible patches, a decoder of hidden ones, and the loss between them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from torchmae.errors import ConfigError, one_of, within
from torchmae.nn.autoencoder import Autoencoder, Reconstruction
from torchmae.nn.decoder import DECODERS
from torchmae.nn.encoder import ViTEncoder
from torchmae.nn.gradients import BINS, oriented_gradients
from torchmae.nn.layers import init_linear
from torchmae.nn.masking import STRATEGIES, Mask, noise_count, spread
from torchmae.nn.patches import gather, grid_size, patch_statistics, patchify, unpatchify

POOLS = ("mean", "cls", "tokens")


class MAEOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        loss: scalar float32, mean squared error over what is hidden.
        pred: (B, M, P) predictions of the masked patches, in the order of `mask.ids_masked` and in the space of the
            target (pixels, or patches normalised by their own statistics).
        mask: the mask that was given; in training with `predict_ratio`, `ids_masked` names what was predicted.
    """

    loss: Tensor
    pred: Tensor
    mask: Mask


class MaskedAutoencoder(Autoencoder):
    """MAE (He et al. 2021). Draws no random numbers: masks come from outside, so the forward pass is a function.

    Args:
        input_size: pixels along each of 1, 2 or 3 axes.
        patch_size: likewise; divides `input_size`.
        in_chans: channels.
        embed_dim: encoder width.
        depth: encoder blocks.
        num_heads: encoder heads.
        mlp_ratio: hidden width of every MLP over its width.
        class_token: prepend a class token.
        drop_path: stochastic depth rate of the encoder's last block.
        decoder: "self" (the paper's) or "cross" (CrossMAE's).
        decoder_embed_dim: decoder width.
        decoder_depth: decoder blocks.
        decoder_num_heads: decoder heads.
        norm_pix: the target is each patch normalised by its own mean and deviation (paper section 4.1).
        predict_ratio: share of the masked patches that training predicts, in (0, 1]; evaluation predicts all.
            Below 1 needs the cross decoder, whose predictions do not depend on each other (CrossMAE, section 3.3).
        feature_weights: the cross decoder's blocks read learned mixtures of all the encoder's layers (section 3.4).
        hog_weight: in training, how much the mean squared error of predicted gradient histograms counts beside that of
            the pixels (MaskFeat's target, Wei et al. 2022); 0: not at all. 2-D images only.

    Raises:
        ConfigError: sizes or options that do not fit together.
    """

    def __init__(
        self,
        *,
        input_size: Sequence[int],
        patch_size: Sequence[int],
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        drop_path: float = 0.0,
        decoder: str = "self",
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        norm_pix: bool = True,
        predict_ratio: float = 1.0,
        feature_weights: bool = False,
        hog_weight: float = 0.0,
    ) -> None:
        super().__init__()
        one_of("decoder", decoder, DECODERS)
        within("predict_ratio", predict_ratio, 0, 1, open_low=True)
        within("hog_weight", hog_weight, 0, float("inf"), open_high=True)
        if hog_weight and len(patch_size) != 2:
            raise ConfigError(f"hog_weight needs images with 2 axes, found {len(patch_size)}", "use hog_weight 0")
        for name, used in (("predict_ratio below 1", predict_ratio < 1), ("feature_weights", feature_weights)):
            if used and decoder != "cross":
                raise ConfigError(f"{name} does not apply to the {decoder!r} decoder", "use decoder 'cross'")
        if norm_pix and prod(patch_size) * in_chans < 2:
            raise ConfigError("norm_pix needs 2 values in a patch to normalise, found 1", "turn norm_pix off")
        self.norm_pix = norm_pix
        self.predict_ratio = predict_ratio
        self.feature_weights = feature_weights
        self.encoder = ViTEncoder(
            input_size=input_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            class_token=class_token,
            drop_path=drop_path,
        )
        self.decoder = DECODERS[decoder](
            embed_dim,
            self.encoder.grid,
            embed_dim=decoder_embed_dim,
            depth=decoder_depth,
            num_heads=decoder_num_heads,
            patch_dim=prod(patch_size) * in_chans,
            mlp_ratio=mlp_ratio,
            **({"feature_weights": depth + 1} if feature_weights else {}),
        )
        self.hog_weight = hog_weight
        self.hog_head = nn.Linear(decoder_embed_dim, in_chans * BINS) if hog_weight else None
        if self.hog_head is not None:
            init_linear(self.hog_head)

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Pixels of a patch along each axis."""
        return self.encoder.patch_size

    def forward(self, images: Tensor, mask: Mask) -> MAEOutput:
        """Predicts the hidden patches and compares them with the target.

        Args:
            images: (B, C, *size) float, normalised as in training; a size other than the one trained on has its
                positions resampled.
            mask: which of their patches are hidden.

        Raises:
            ConfigError: images of another number of channels or axes, or a mask of another batch or grid.
        """
        patches, grid = self._cut(images, mask)
        encoded = self.encoder.forward_patches(
            gather(patches, mask.ids_keep), mask.ids_keep, grid, keep_blocks=self.feature_weights
        )
        asked = mask
        if self.training and self.predict_ratio < 1:
            asked = Mask(mask.ids_keep, spread(mask.ids_masked, self.predict_ratio))
        tokens = self.decoder.tokens(encoded, asked, grid)
        pred = self.decoder.pred(tokens)
        loss = F.mse_loss(pred.float(), self._target(gather(patches, asked.ids_masked)))
        if self.training and self.hog_head is not None:
            histograms = gather(oriented_gradients(images, self.patch_size), asked.ids_masked)
            loss = loss + self.hog_weight * F.mse_loss(self.hog_head(tokens).float(), histograms)
        return MAEOutput(loss, pred, asked)

    def encode(self, images: Tensor, pool: str = "mean") -> Tensor:
        """Features of whole images; nothing is ever masked here.

        Args:
            images: (B, C, *size) float, normalised as in training.
            pool: "mean" of the patch tokens (B, D), the class token "cls" (B, D), or all patch "tokens" (B, L, D).

        Raises:
            ConfigError: "cls" of a model that has no class token.
        """
        one_of("pool", pool, POOLS)
        if pool == "cls" and not self.encoder.num_prefix_tokens:
            raise ConfigError("pool is 'cls' but the model has no class token", "use 'mean' or 'tokens'")
        encoded = self.encoder(images)
        if pool == "tokens":
            return encoded.patches
        if pool == "mean":
            return encoded.patches.mean(1)
        return encoded.prefix[:, 0]

    def reconstruct(self, images: Tensor, mask: Mask) -> Reconstruction:
        """Fills in the hidden patches and leaves the visible ones as they are. Arguments as for `forward`."""
        patches, grid = self._cut(images, mask)
        pred = self(images, mask).pred.float()
        note = "hidden patches as predicted"
        if self.norm_pix:
            mean, std = patch_statistics(gather(patches, mask.ids_masked))
            pred = pred * std + mean
            note = "hidden patches as predicted, with the true mean and contrast of each patch put back"
        index = mask.ids_masked.unsqueeze(-1).expand_as(pred)
        pasted = patches.scatter(1, index, pred.to(patches.dtype))
        filled = unpatchify(pasted, self.patch_size, grid)
        return Reconstruction(filled, self.removed_pixels(mask, grid), note)

    def draw_mask(self, strategy: str, noise: Tensor, ratio: float, size: Sequence[int] | None = None) -> Mask:
        """A mask from (B, `noise_count(strategy, size)`) uniform random numbers, for images of a size."""
        one_of("mask.strategy", strategy, STRATEGIES)
        return STRATEGIES[strategy](noise, self._grid(size), ratio)

    def noise_count(self, strategy: str, size: Sequence[int] | None = None) -> int:
        """Random numbers a mask takes for each sample; ConfigError for a strategy that does not hide patches."""
        one_of("mask.strategy", strategy, STRATEGIES)
        return noise_count(strategy, self._grid(size))

    def _grid(self, size: Sequence[int] | None) -> tuple[int, ...]:
        return self.encoder.grid if size is None else grid_size(size, self.patch_size)

    def num_targets(self, mask: Mask) -> int:
        """How many values are hidden: what the loss counts for beside that of other masks."""
        return mask.ids_masked.numel() * prod(self.patch_size) * self.encoder.in_chans

    def removed_pixels(self, mask: Mask, grid: tuple[int, ...] | None = None) -> Tensor:
        """(B, 1, *size) bool, True where a pixel is hidden; `grid` is the mask's, None for the one trained on."""
        flags = mask.removed().unsqueeze(-1).expand(-1, -1, prod(self.patch_size))
        return unpatchify(flags, self.patch_size, grid or self.encoder.grid)

    def hidden_values(self, images: Tensor, mask: Mask) -> Tensor:
        """(B, M, P): what `forward` compares its predictions with."""
        return self._target(gather(self._cut(images, mask)[0], mask.ids_masked))

    def hidden_predictions(self, output: MAEOutput) -> Tensor:
        """(B, M, P) float32: what of a forward pass stands against `hidden_values`."""
        return output.pred.float()

    def visible_mean(self, images: Tensor, mask: Mask) -> Tensor:
        """(B, 1, P): the mean of each image's visible patches in the target's space, the simplest prediction."""
        return self._target(gather(self._cut(images, mask)[0], mask.ids_keep)).mean(1, keepdim=True)

    def _cut(self, images: Tensor, mask: Mask) -> tuple[Tensor, tuple[int, ...]]:
        """Patches and grid of images that fit the model and the mask; ConfigError where they do not."""
        self.encoder.check(images)
        grid = grid_size(images.shape[2:], self.patch_size)
        batch, length = len(mask.ids_keep), mask.ids_keep.shape[1] + mask.ids_masked.shape[1]
        if (batch, length) != (len(images), prod(grid)):
            raise ConfigError(
                f"the mask is for {batch} images of {length} patches, the batch has {len(images)} of {prod(grid)}",
                "give every image of the batch a mask of its own grid",
            )
        return patchify(images, self.patch_size), grid

    def _target(self, patches: Tensor) -> Tensor:
        patches = patches.float()
        if not self.norm_pix:
            return patches
        mean, std = patch_statistics(patches)
        return (patches - mean) / std


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Trained values in the encoder and in the rest of the model."""
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    encoder = sum(p.numel() for name, p in model.named_parameters() if name.startswith("encoder") and p.requires_grad)
    return encoder, total - encoder


def no_weight_decay(name: str, parameter: Tensor) -> bool:
    """Whether weight decay leaves a parameter alone: biases, norms, class and mask tokens, as is usual."""
    return parameter.ndim <= 1 or name.rpartition(".")[2] in ("cls_token", "mask_token")
