"""Finds the encoder's parameters in a checkpoint by name, under any wrapper and prefix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchmae.errors import CheckpointError
from torchmae.interop.files import plain

_MARK = "patch_embed.proj.weight"
_HF_MARK = re.compile(r"(?:^|\.)embeddings\.(?:cls_token|patch_embeddings\.)")
# Names that compilation, data parallelism and activation checkpointing insert between the names of modules.
_WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PLAIN_PREFIXES = ("", "model.")  # a state_dict, and the released checkpoints' layout


def split_choice(source: Path) -> tuple[Path, str | None]:
    """Splits FILE#PART into the file and the part; the part is None where none is named."""
    file, mark, part = str(source).rpartition("#")
    if mark and not source.exists() and Path(file).is_file():
        return Path(file), part
    return source, None


def find_encoder(content: Mapping[str, Any], choice: str | None, origin: str) -> tuple[dict[str, Tensor], list[str]]:
    """The parameters of one encoder in a checkpoint, without their prefix, and notes about what is not used.

    `content` is a state_dict or nested dictionaries with state_dicts. `choice` names the encoder ("teacher",
    "model_ema", "student.backbone"); None: there must be one only. `origin` is the file, for messages.
    CheckpointError: no encoder, several without a choice, or a choice that matches none.
    """
    tensors = dict(_tensors(content, "", set()))
    if not tensors:
        raise CheckpointError(f"{origin} holds no parameters by name", "give a state_dict, or a {'model': state_dict}")
    found = _candidates(tensors)
    if not found and any(map(_HF_MARK.search, tensors)):
        raise CheckpointError(f"{origin} is a transformers model", "give its folder, with config.json")
    if not found:
        some = ", ".join(sorted(tensors)[:3])
        raise CheckpointError(
            f"{origin} holds no vision transformer: it has no {_MARK} (it has {some}, ...)", "see docs/weights.md"
        )
    labels = _labels(list(found))
    if choice is not None:
        chosen = [prefix for prefix in found if _leads_to(choice, prefix)]
    else:
        chosen = [prefix for i, prefix in enumerate(found) if not _repeats(list(found.values()), i)]
    if len(chosen) != 1:
        names = ", ".join(labels.values())
        problem = f"{origin} holds {len(found)} encoders: {names}"
        if choice is not None:
            problem = f"{origin} holds {len(chosen) or 'no'} encoders under {choice!r}: there are {names}"
        raise CheckpointError(problem, f"choose one: {origin}#{list(labels.values())[-1]}")
    (prefix,) = chosen
    usual = len(found) == 1 and prefix in _PLAIN_PREFIXES
    notes = [] if usual else [f"taken from {prefix.rstrip('.') or 'the first level'} of the file"]
    others = sorted({_group(name, prefix) for name in tensors if name.removeprefix(prefix) not in found[prefix]})
    if others:
        notes.append(f"not used: {', '.join(others)}")
    return {_WRAPPER.sub("", name): tensor for name, tensor in found[prefix].items()}, notes


def _tensors(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dictionaries with their dotted names; a repeated dictionary counts once."""
    value = plain(value)
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict) and id(value) not in seen and len(seen) < 10_000:
        seen.add(id(value))
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}" if name else str(key), seen)


def _candidates(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The parameters of each encoder, by the prefix of their names (which ends in a dot)."""
    marks = [name.removesuffix(_MARK) for name in tensors if name.endswith(_MARK)]
    prefixes = [prefix for prefix in marks if not prefix or prefix.endswith(".")]
    found: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    for name, tensor in tensors.items():
        around = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)
        if around is not None:
            found[around][name.removeprefix(around)] = tensor
    return found


def _repeats(found: list[dict[str, Tensor]], index: int) -> bool:
    """Whether an encoder before it in the list has equal values."""
    one = found[index]
    return any(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for other in found[:index]
    )


def _labels(prefixes: list[str]) -> dict[str, str]:
    """The shortest unambiguous beginning of each prefix; "." stands for an empty prefix."""
    labels = {}
    for prefix in prefixes:
        parts = prefix.rstrip(".").split(".")
        starts = (".".join(parts[: i + 1]) for i in range(len(parts)))
        unique = (start for start in starts if [p for p in prefixes if _leads_to(start, p)] == [prefix])
        labels[prefix] = next(unique, prefix.rstrip(".")) or "."
    return labels


def _leads_to(choice: str, prefix: str) -> bool:
    """Whether `choice` is the prefix or a beginning of it, up to a dot."""
    return prefix == "" if choice in (".", "") else prefix.startswith(f"{choice.rstrip('.')}.")


def _group(name: str, prefix: str) -> str:
    """The beginning of a parameter's name, up to the first part that differs from `prefix`."""
    parts, common = name.split("."), prefix.split(".")
    same = next((i for i, part in enumerate(parts) if i >= len(common) or part != common[i]), len(parts) - 1)
    return ".".join(parts[: same + 1])
