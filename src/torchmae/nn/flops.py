"""Floating-point operations of a model, by formula: what a step must compute, whatever computes it.

Matrix products only, a multiplication and an addition each (2 m n k for an (m, k) by (k, n) product), which is what
`torch.utils.flop_counter` counts. Norms, GELU, softmax and the optimiser are left out: they are bound by memory.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

from torchmae.nn.masking import num_keep
from torchmae.nn.patches import grid_size


class Flops(NamedTuple):
    """Operations for one image.

    Attributes:
        patch_embed: of the layer that embeds patches; its input needs no gradient.
        encoder: of a forward pass through the encoder's blocks.
        decoder: of a forward pass through the decoder, its embedding and its prediction.
    """

    patch_embed: int
    encoder: int
    decoder: int

    @property
    def forward(self) -> int:
        """One forward pass."""
        return self.patch_embed + self.encoder + self.decoder

    @property
    def training(self) -> int:
        """A forward and a backward pass: three times a forward one, less the gradient of the pixels."""
        return 3 * self.forward - self.patch_embed

    @property
    def recomputed(self) -> int:
        """`training` with the blocks' activations computed a second time in the backward pass, to save memory."""
        return self.training + self.encoder + self.decoder


def count_flops(arguments: dict[str, Any], mask_ratio: float) -> Flops:
    """Operations of pre-training on one image of the size that a model is made for.

    Args:
        arguments: of `presets.construct`.
        mask_ratio: share of the patches that is hidden; the encoder sees the others only.

    Raises:
        ConfigError: sizes that do not fit together, or a ratio outside (0, 1).
    """
    if "hidden_dim" in arguments:
        layer = 2 * prod(arguments["input_size"]) * arguments["in_chans"] * arguments["hidden_dim"]
        return Flops(patch_embed=layer, encoder=0, decoder=layer)
    length = prod(grid_size(arguments["input_size"], arguments["patch_size"]))
    keep = num_keep(length, mask_ratio)
    prefix = int(arguments["class_token"])
    patch_dim = prod(arguments["patch_size"]) * arguments["in_chans"]
    width, ratio = arguments["embed_dim"], arguments["mlp_ratio"]
    dim, depth = arguments["decoder_embed_dim"], arguments["decoder_depth"]
    hidden = max(1, round((length - keep) * arguments.get("predict_ratio", 1.0)))
    seen = keep + prefix
    if arguments["decoder"] == "self":
        blocks = depth * _block(length + prefix, dim, ratio)
    else:
        blocks = depth * _cross_block(hidden, seen, dim, ratio)
    embeddings = depth if arguments.get("feature_weights") else 1  # of the encoder's tokens
    return Flops(
        patch_embed=2 * keep * patch_dim * width,
        encoder=arguments["depth"] * _block(seen, width, ratio),
        decoder=2 * seen * width * dim * embeddings + blocks + 2 * hidden * dim * patch_dim,
    )


def encode_flops(arguments: dict[str, Any]) -> int:
    """Operations of encoding one whole image, nothing hidden. Arguments as for `count_flops`."""
    if "hidden_dim" in arguments:
        return count_flops(arguments, 0.5).patch_embed
    length = prod(grid_size(arguments["input_size"], arguments["patch_size"]))
    patch_dim = prod(arguments["patch_size"]) * arguments["in_chans"]
    tokens = length + int(arguments["class_token"])
    width = arguments["embed_dim"]
    return 2 * length * patch_dim * width + arguments["depth"] * _block(tokens, width, arguments["mlp_ratio"])


def _block(tokens: int, dim: int, mlp_ratio: float) -> int:
    """Self-attention and MLP: projections, then queries by keys and weights by values."""
    return 2 * tokens * dim * 4 * dim + 4 * tokens * tokens * dim + _mlp(tokens, dim, mlp_ratio)


def _cross_block(queries: int, context: int, dim: int, mlp_ratio: float) -> int:
    """As `_block`; keys and values come from the context."""
    projections = 2 * dim * dim * (2 * queries + 2 * context)
    return projections + 4 * queries * context * dim + _mlp(queries, dim, mlp_ratio)


def _mlp(tokens: int, dim: int, mlp_ratio: float) -> int:
    return 2 * 2 * tokens * dim * int(dim * mlp_ratio)
