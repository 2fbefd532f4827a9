"""Converts the parameters of other vision transformers to timm's layout where the result computes exactly the same."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Never

import torch
from torch import Tensor, nn

from torchmae.errors import CheckpointError
from torchmae.interop.weights import no_vit

_ATTENTION = re.compile(r"((?:decoder_)?blocks\.\d+\.attn\.)(?:qkv|q|q_proj)\.weight$")
_SEPARABLE = ("pos_embed_spatial", "pos_embed_temporal", "pos_embed_class")
_PATCHES = "patch_embed.proj.weight"

Weights = dict[str, Tensor]


def convert(weights: Weights, facts: dict[str, Any], size: Sequence[int] | None, notes: list[str]) -> Weights:
    """An encoder's parameters under timm's names and in its shapes; the decoder's are kept.

    Separate queries, keys and values are joined (an absent bias is zero) and separable positions are added up. Patches
    of several frames become patches of one picture if `size` has two numbers.

    Args:
        weights: the parameters.
        facts: what is known about the source; "input_size" is added.
        size: pixels along each axis of the training images, where the weights do not show them.
        notes: gets a sentence for each change.

    Raises:
        CheckpointError: positions of an unknown grid, or parameters of another kind of network.
    """
    weights = _add_up_positions(join_attention(dict(weights), notes), facts, size, notes)
    for name, dimensions in ((_PATCHES, (3, 4, 5)), ("pos_embed", (3,))):
        if name not in weights:
            return weights  # `reading` reports it
        if weights[name].ndim not in dimensions:
            raise no_vit(facts["origin"], f"{name} is {tuple(weights[name].shape)}")
    patch = weights[_PATCHES].shape[2:]
    if facts.get("input_size") is None:
        facts["input_size"] = _input_size(weights, patch, size, facts["origin"])
    if len(patch) == 3 and size is not None and len(size) == 2:
        return _one_frame(weights, facts, notes)
    return weights


def join_attention(weights: Weights, notes: list[str]) -> Weights:
    """Joins separate q, k and v, or their biases, into `attn.qkv`; a bias that no block has becomes zeros."""
    said: dict[str, None] = {}
    biases: dict[str, list[str | None]] = {}
    for block in [match[1] for name in weights if (match := _ATTENTION.match(name))]:
        for form in ("", "_proj"):
            parts = [f"{block}{part}{form}.weight" for part in "qkv"]
            if all(part in weights for part in parts):
                weights[f"{block}qkv.weight"] = torch.cat([weights.pop(part) for part in parts])
                said["queries, keys and values joined"] = None
        if f"{block}qkv.weight" in weights:
            spellings = [[f"{block}{part}{form}" for form in ("_bias", ".bias", "_proj.bias")] for part in "qkv"]
            biases[block] = [next((name for name in names if name in weights), None) for names in spellings]
    absent = [0 if f"{block}qkv.bias" in weights else found.count(None) for block, found in biases.items()]
    for block, found in biases.items():
        if f"{block}qkv.bias" in weights or found.count(None) > min(absent):  # the second: damaged, reported later
            continue
        zero = torch.zeros(len(weights[f"{block}qkv.weight"]) // 3)
        weights[f"{block}qkv.bias"] = torch.cat([zero if name is None else weights.pop(name) for name in found])
        zeros = ", ".join(part for part, name in zip("qkv", found, strict=True) if name is None)
        said["biases of queries, keys and values joined" + (f"; zero for {zeros}" if zeros else "")] = None
    notes += said
    return weights


def _add_up_positions(weights: Weights, facts: dict[str, Any], size: Sequence[int] | None, notes: list[str]) -> Weights:
    """Makes `pos_embed` of separate positions in space and time: their sum for each patch, in frame-major order."""
    if "pos_embed" in weights or not {"pos_embed_spatial", "pos_embed_temporal"} <= set(weights):
        return weights
    space, time, prefix = (weights.pop(name, None) for name in _SEPARABLE)
    assert space is not None and time is not None
    positions = (time[0][:, None] + space[0][None]).flatten(0, 1)[None]
    if prefix is not None:
        positions = torch.cat([prefix, positions], dim=1)
    elif "cls_token" in weights:
        positions = nn.functional.pad(positions, (0, 0, 1, 0))
    frames, *patch = weights[_PATCHES].shape[2:]
    if len(patch) == 2:
        wanted = None if size is None else tuple(size)[-2:]
        grid = _grid(space.shape[1], patch, wanted) or _unknown(facts["origin"], space.shape[1], patch, 2)
        facts["input_size"] = (time.shape[1] * frames, *(n * p for n, p in zip(grid, patch, strict=True)))
    notes.append("separable positions added up: in space, in time")
    return {**weights, "pos_embed": positions}


def _input_size(weights: Weights, patch: Sequence[int], size: Sequence[int] | None, origin: str) -> tuple[int, ...]:
    """The image size that the number of positions belongs to: `size` if it fits, else a square."""
    count = weights["pos_embed"].shape[1]
    rows = [count - 1, count] if "cls_token" in weights else [count]  # in timm the class token may have no position
    for patches in rows:
        grid = _grid(patches, patch, size)
        if grid is not None:
            return tuple(n * p for n, p in zip(grid, patch, strict=True))
    return _unknown(origin, rows[0], patch, len(patch))


def _grid(count: int, patch: Sequence[int], size: Sequence[int] | None) -> tuple[int, ...] | None:
    """The grid of `count` patches: a square if possible, else that of `size`, times frames; None: neither fits."""
    side = math.isqrt(count)
    if len(patch) == 1:
        return (count,)
    if len(patch) == 2 and side * side == count:
        return (side, side)
    if size is None or not 2 <= len(size) <= len(patch):
        return None
    grid = tuple(length // p for length, p in zip(size, patch[-len(size) :], strict=True))
    frames, rest = divmod(count, max(1, math.prod(grid)))
    if rest or not frames:
        return None
    if len(grid) < len(patch):
        return (frames, *grid)
    return grid if frames == 1 else None


def _unknown(origin: str, count: int, patch: Sequence[int], axes: int) -> Never:
    """Raises CheckpointError with the grids that `count` positions may belong to."""
    grids: list[tuple[int, ...]] = []
    for side in range(math.isqrt(count), 1, -1):
        rest, odd = divmod(count, side * side if axes == 3 else side)
        if not odd:
            grids.append((rest, side, side) if axes == 3 else (side, rest))
    shown = ", ".join("x".join(map(str, grid)) for grid in grids[:4]) or "of no rectangle"
    sizes = [[n * p for n, p in zip(grid, patch, strict=True)] for grid in grids[:1]]
    more = f", or {sizes[0][1:]} for its first frame alone" if axes == 3 and sizes else ""
    raise CheckpointError(
        f"{origin} has {count} positions and does not say for which grid: {shown}",
        f"say the size of the images it is for, such as --model.input_size {sizes[0]}{more}"
        if sizes
        else "see docs/weights.md",
    )


def _one_frame(weights: Weights, facts: dict[str, Any], notes: list[str]) -> Weights:
    """Converts weights for clips to weights for pictures; a picture stands for all frames of a clip's first patches."""
    length, *patch = weights[_PATCHES].shape[2:]
    frames, *size = facts["input_size"]
    patches = math.prod(n // p for n, p in zip(size, patch, strict=True))
    facts["input_size"] = tuple(size)
    if length > 1:
        notes.append(f"patches of {length} frames summed: exact for a picture that is shown {length} times")
    if frames > length:
        notes.append(f"positions of the first of {frames // length} frames")
    prefix = weights["pos_embed"].shape[1] % patches  # 1 if the class token has a position
    positions = weights["pos_embed"][:, : prefix + patches]
    return {**weights, _PATCHES: weights[_PATCHES].sum(2), "pos_embed": positions}
