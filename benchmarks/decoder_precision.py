"""What it is worth that a decoder's tokens are bf16 under autocast, sums included, where an encoder's are fp32.

    python benchmarks/decoder_precision.py --run RUN --data DATA [--steps 12]

Both ways with the run's model on the same batch of its data, in turns: the time of a training step, and how far the
gradient lies from that of fp32, as a share of its norm.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import torchmae
from torchmae.building import pretrain_settings
from torchmae.config import DataConfig, PretrainConfig
from torchmae.data.loader import Plan
from torchmae.data.opening import open_data
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.training.optim import set_lr
from torchmae.training.pretrain_task import PretrainTask
from torchmae.training.runtime import open_runtime, processor
from torchmae.training.trainer import train_step

BATCH = 256


class Wide(nn.Module):
    """A linear layer whose result is fp32; what it is added to and joined with then is too."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    runtime = open_runtime("auto", "bf16", None)
    model = torchmae.load(args.run).model.to(runtime.device)
    assert isinstance(model, MaskedAutoencoder)
    size = tuple(cells * side for cells, side in zip(model.encoder.grid, model.patch_size, strict=True))
    data = open_data(
        DataConfig(args.data), input_size=size, channels=model.encoder.in_chans, device=runtime.device
    ).train
    batch = next(data.train_batches(Plan(len(data), BATCH, 0), 0, 1))
    config = PretrainConfig(batch_size=BATCH)
    mask = Masker(model.encoder, **asdict(config.mask))(0, batch.epoch, batch.indices, runtime.device)
    wide = copy.deepcopy(model)
    wide.decoder.embed = Wide(wide.decoder.embed)  # type: ignore[assignment]

    def gradient(of: MaskedAutoencoder, precision: str) -> Tensor:
        of.zero_grad()
        with replace(runtime, precision=precision).autocast():
            loss = of(batch.images, mask).loss
        loss.backward()
        return torch.cat([p.grad.flatten() for p in of.parameters() if p.grad is not None])

    exact = gradient(model, "fp32")
    ways = {"bf16 tokens": model, "fp32 tokens": wide}
    errors = {name: ((gradient(way, "bf16") - exact).norm() / exact.norm()).item() for name, way in ways.items()}
    tasks = {name: PretrainTask(pretrain_settings(config, way), way, runtime, BATCH) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.steps):
        for name in ways:
            set_lr(tasks[name].optimizers, 0.0)
            start = time.perf_counter()
            train_step(tasks[name], (batch.images, mask)).loss.item()
            seconds[name].append(time.perf_counter() - start)
    print(f"{processor()}; torch {torch.__version__}; {args.run}, batch {BATCH}")
    for name in ways:
        print(f"{name}: {statistics.median(seconds[name]) * 1000:6.1f} ms a step; gradient off by {errors[name]:.4f}")


if __name__ == "__main__":
    main()
