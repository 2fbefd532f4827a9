"""Views of a model's features as arrays: colours of patches, attention, a map. `report.feature_pictures` draws them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from torchmae.errors import ConfigError, one_of
from torchmae.nn.layers import Attention, Block
from torchmae.nn.mae import MaskedAutoencoder, patches_with_data, require_patches
from torchmae.nn.patches import patchify
from torchmae.random import Purpose, permutation

FloatArray = npt.NDArray[np.float32]

EMBEDDINGS = ("tsne", "pca", "umap")
# Percent of the patches beyond each end of the colour range, so that one outlier does not grey the rest.
_CLIPPED = 1.0
# Shifts of an image for the mean at each place; on a finer grid a sample of shifts is enough.
SHIFTS = 16
# Principal components for t-SNE and UMAP: more add noise and time.
_MAP_DIMS = 50


def patch_colours(tokens: Tensor) -> FloatArray:
    """Patch features (B, L, D) as colours (B, L, 3) in [0, 1]: the first three principal components (as in DINOv2).

    A patch with NaN for features has NaN for a colour.

    All images share the components, so a colour means the same in every image. Each component is scaled to [0, 1]
    between its 1st and 99th percentile, with the sign that makes its largest weight positive: the same features always
    have the same colours. A component that is missing or constant is 0.5.
    """
    batch, length, dim = tokens.shape
    assert batch * length >= 2
    every = tokens.detach().cpu().double().reshape(-1, dim)
    known = ~every[:, 0].isnan()
    rows = every[known]
    scores = principal_components(rows, 3)
    low, high = np.percentile(scores, [_CLIPPED, 100 - _CLIPPED], axis=0)
    # A spread at the level of rounding errors counts as none.
    spread = np.where(high - low > 1e-9 * max(float(rows.abs().max()), 1e-30), high - low, np.inf)
    colours = np.full((len(rows), 3), 0.5, dtype=np.float32)
    colours[:, : scores.shape[1]] = ((scores - (low + high) / 2) / spread + 0.5).clip(0, 1)
    of_all = np.full((batch * length, 3), np.nan, dtype=np.float32)
    of_all[known.numpy()] = colours
    return of_all.reshape(batch, length, 3)


def principal_components(rows: Tensor, most: int) -> npt.NDArray[np.float64]:
    """The first `most` principal components of (N, D) rows, or as many as there are: scores (N, min(most, N, D)).

    The sign of a component makes its largest weight positive.
    """
    centred = rows - rows.mean(0)
    components = torch.linalg.svd(centred, full_matrices=False).Vh[:most]
    signs = components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
    scores: npt.NDArray[np.float64] = (centred @ (components * signs).T).numpy()
    return scores


@torch.no_grad()
def content_tokens(model: MaskedAutoencoder, images: Tensor, valid: Tensor | None = None) -> Tensor:
    """Patch features (B, L, D) of normalised (B, C, *size) images, without the part that depends on position alone.

    `valid` is as in `MaskedAutoencoder.encode`; a patch without data has NaN for features.

    Position explains most of the variance of a masked autoencoder's patch features. From each position, this function
    subtracts the mean over 16 cyclic shifts of the images by whole patches: the same content at all positions. One
    image is enough. The model is in eval mode, on the images' device; ConfigError for a model without patches.
    """
    require_patches(model, "to look at")
    grid = model.encoder.grid_of(images)
    axes = tuple(range(2, images.ndim))
    places = permutation(0, 0, prod(grid), Purpose.SUBSET)[:SHIFTS]
    known = images.new_ones(len(images), 1, *images.shape[2:]).bool() if valid is None else valid

    def shifted(steps: Sequence[Any]) -> tuple[Tensor, Tensor]:
        shift = [int(step) * patch for step, patch in zip(steps, model.patch_size, strict=True)]
        rolled = known.roll(shift, axes)
        tokens = model.encode(images.roll(shift, axes), "tokens", rolled).float()
        return tokens, patchify(rolled, model.patch_size).any(-1, keepdim=True)

    total, count = torch.zeros((), device=images.device), torch.zeros((), device=images.device)
    for place in places:
        tokens, has_data = shifted(np.unravel_index(place, grid))
        total, count = total + (tokens * has_data).sum(0), count + has_data.sum(0)
    tokens, has_data = shifted([0] * len(axes))
    return (tokens - total / count.clamp(min=1)).masked_fill(~has_data, torch.nan)


@torch.no_grad()
def class_attention(model: MaskedAutoencoder, images: Tensor, valid: Tensor | None = None) -> FloatArray:
    """Attention of the class token to each patch in the encoder's last block, (B, heads, L).

    The softmax weights of a head sum to less than 1, because the class token itself and registers get some. Arguments
    as for `content_tokens`; ConfigError for a model without patches or class token.
    """
    require_patches(model, "to look at")
    encoder = model.encoder
    if not encoder.has_class_token:
        raise ConfigError(
            "the model has no class token whose attention could be shown",
            "look at --kind pca, or train with --model.class_token true",
        )
    block = encoder.blocks[-1]
    assert isinstance(block, Block)
    seen: list[Tensor] = []
    # Fused attention never forms these weights: compute them again from its input.
    hook = block.attn.register_forward_pre_hook(lambda module, args: seen.append(attention_weights(module, *args)))
    parts = [] if valid is None else list(patches_with_data(valid, model.patch_size))
    try:
        for rows, ids in parts:
            encoder(images[rows], ids)
        if not parts:
            encoder(images)
    finally:
        hook.remove()
    found = [item[:, :, 0, encoder.num_prefix_tokens :].float() for item in seen]
    weights = found[0]
    if parts:
        weights = found[0].new_full((len(images), found[0].shape[1], prod(encoder.grid_of(images))), torch.nan)
        for values, (rows, ids) in zip(found, parts, strict=True):
            weights[rows] = weights[rows].scatter(2, ids[:, None].expand_as(values), values)
    result: FloatArray = weights.cpu().numpy()
    return result


def attention_weights(attention: Attention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D / heads)) of self-attention: (B, N, D) tokens to (B, heads, N, N), rows that sum to 1."""
    batch, tokens, _ = x.shape
    q, k, _ = attention.qkv(x).view(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights: Tensor = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
    return weights


def embed_2d(features: Tensor, method: str = "tsne", seed: int = 0) -> FloatArray:
    """A map (N, 2) of features (N, D), N 3 or more, on which similar features lie close together.

    Features are centred, scaled to unit length and reduced to their first 50 principal components. "pca" shows the
    first two; "tsne" (van der Maaten and Hinton 2008) and "umap" (McInnes et al. 2018) keep neighbours together and
    give distances between groups no meaning. `seed` is UMAP's; t-SNE starts from the principal components.

    Raises:
        ConfigError: UMAP is not installed, or there are too few images.
    """
    one_of("method", method, EMBEDDINGS)
    count = len(features)
    if count < 3:
        raise ConfigError(f"a map of {count} images says nothing", "give 3 or more")
    rows = F.normalize((features - features.mean(0)).cpu().double(), dim=1)
    reduced = principal_components(rows, min(_MAP_DIMS, count - 1))
    reduced = np.pad(reduced, ((0, 0), (0, max(0, 2 - reduced.shape[1]))))  # one feature alone is a line
    if method == "pca":
        place = reduced[:, :2]
    elif method == "umap":
        place = _umap(reduced, seed)
    else:
        from sklearn.manifold import TSNE

        options = {"init": "pca", "max_iter": 500, "random_state": 0, "n_jobs": 1}  # twice as many change little
        place = TSNE(perplexity=min(30.0, (count - 1) / 3), **options).fit_transform(reduced)
    return place.astype(np.float32)


def _umap(rows: npt.NDArray[np.float64], seed: int) -> npt.NDArray[np.float64]:
    try:
        umap = import_module("umap")
    except ImportError as error:
        raise ConfigError("method is 'umap', which is not installed", "pip install umap-learn, or use tsne") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # with a seed UMAP uses one thread, and warns of it
        mapper = umap.UMAP(n_neighbors=min(15, len(rows) - 1), random_state=seed)
        placed: npt.NDArray[np.float64] = mapper.fit_transform(rows)
    return placed
