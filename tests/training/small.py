"""Small parts for tests of the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchmae import presets
from torchmae.building import pretrain_settings
from torchmae.config import PretrainConfig
from torchmae.data.loader import Batch, Plan, shard
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.training.pretrain import pretrain
from torchmae.training.progress import Display
from torchmae.training.run_folder import RunFolder
from torchmae.training.runtime import Runtime
from torchmae.training.state import State

RUNTIME = Runtime(torch.device("cpu"), "fp32", 1)


def vit(**overrides: Any) -> MaskedAutoencoder:
    """A network of a few thousand weights, the same at every call."""
    torch.manual_seed(1)
    sizes = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    return presets.build("vit_digits", **(sizes | decoder | overrides))


def mlp(**overrides: Any) -> MaskedAutoencoder:
    torch.manual_seed(1)
    return presets.build("mlp", **({"input_size": (8, 8), "in_chans": 1, "hidden_dim": 12} | overrides))


class Images:
    """In place of an ImageLoader: the batches that the plan asks for, of images that are given."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def train_batches(
        self, plan: Plan, start: int, stop: int, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        for step in range(start, stop):
            epoch, indices = plan.indices(step)
            indices = shard(indices, rank, world_size)
            yield Batch(self.images[indices], torch.full((len(indices),), -1), indices, epoch)

    def eval_batches(self, indices: np.ndarray, batch_size: int) -> Iterator[Batch]:
        for first in range(0, len(indices), batch_size):
            mine = indices[first : first + batch_size]
            yield Batch(self.images[torch.from_numpy(mine)], torch.full((len(mine),), -1), mine, 0)


def images(count: int) -> Images:
    return Images(torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(2)))


class Memory:
    """A tracker that keeps what it gets."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self.records.append({"kind": kind, "step": step, **values})

    def close(self) -> None:
        pass

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]


def train(
    config: PretrainConfig, model: MaskedAutoencoder, loader: Images, out: Path, **others: Any
) -> tuple[State, Memory]:
    """One call of the loop."""
    out.mkdir(parents=True, exist_ok=True)
    tracker = Memory()
    arguments: dict[str, Any] = {
        "batch_size": config.batch_size,
        "epochs": config.epochs,
        "max_minutes": config.max_minutes,
        "fingerprint": "abc",
        "runtime": RUNTIME,
        "folder": RunFolder(out),
        "tracker": tracker,
        "display": Display("none"),
    }
    state = pretrain(pretrain_settings(config, model), model=model, loader=loader, **(arguments | others))  # type: ignore[arg-type]
    return state, tracker
