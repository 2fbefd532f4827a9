"""Sharded checkpoints: one safetensors file per rank, written by torch.distributed.checkpoint.

Its safetensors storage is used, since the index of its default format is a pickle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save


def write_shards(path: Path, model: dict[str, Tensor], optimizers: list[dict[str, Any]]) -> None:
    """Writes every rank's shards into the folder `path`; collective."""
    tensors = {f"model.{name}": value for name, value in model.items()}
    for number, optimizer in enumerate(optimizers):
        for index, values in optimizer["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{name}": value for name, value in values.items()}
    contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
    try:
        save(contiguous, storage_writer=HuggingFaceStorageWriter(str(path), save_distributed=True))
    except CheckpointException as error:  # raised on all ranks; torch derives it from BaseException
        first = next(iter(error.failures.values()))[0]
        raise RuntimeError(f"{type(first).__name__}: {first}") from error


def read_shards(path: Path, param_groups: list[Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Reads the whole state_dicts of model and optimisers, written by any number of ranks. Not collective.

    `param_groups` belong to each optimiser's state_dict; shards hold its tensors only.
    """
    reader = HuggingFaceStorageReader(str(path))
    sizes = cast(dict[str, TensorStorageMetadata], reader.read_metadata().state_dict_metadata)
    tensors = {name: torch.empty(item.size, dtype=item.properties.dtype) for name, item in sizes.items()}
    load(tensors, storage_reader=reader, no_dist=True)
    model: dict[str, Tensor] = {}
    optimizers: list[dict[str, Any]] = [{"state": {}, "param_groups": groups} for groups in param_groups]
    for name, tensor in tensors.items():
        kind, rest = name.split(".", 1)
        if kind == "model":
            model[rest] = tensor
        else:
            number, index, leaf = rest.split(".")
            optimizers[int(number)]["state"].setdefault(int(index), {})[leaf] = tensor
    return model, optimizers
