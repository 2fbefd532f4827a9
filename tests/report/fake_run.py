"""A small run folder, as `torchmae pretrain` leaves it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from torchmae.config import PretrainConfig
from torchmae.report.pictures import reconstruction_grid

NOTE = "masked patches as predicted, with their true mean put back"


def train_records() -> list[dict[str, Any]]:
    return [
        {
            "kind": "train",
            "step": step,
            "epoch": step / 50,
            "loss": 0.4 + 20 / step,
            "lr": 1e-3 * (1 - step / 110),
            "grad_norm": 1.0,
            "update_to_weight": 2e-3 - 1e-5 * step,
            "images_per_s": 300.0 + step,
            "data_wait": 0.01,
            "seconds": step * 0.5,
        }
        for step in range(10, 101, 10)
    ]


def val_records() -> list[dict[str, Any]]:
    return [
        {
            "kind": "val",
            "step": step,
            "epoch": step / 50,
            "loss": loss,
            "loss_mean_patch": 1.0,
            "loss_interpolation": 0.6,
            "explained_variance": 1 - loss,
            "explained_variance_interpolation": 0.4,
            "knn": knn,
            "linear": knn + 5,
        }
        for step, loss, knn in ((50, 0.7, 70.0), (100, 0.5, 80.0))
    ]


def summary(**changes: Any) -> dict[str, Any]:
    figures = {
        "state": "finished",
        "steps": 100,
        "epochs": 2,
        "images_seen": 3000,
        "seconds": 75.0,
        "images_per_s": 40.0,
        "loss": 0.5,
        "loss_mean_patch": 1.0,
        "loss_interpolation": 0.6,
        "explained_variance": 0.5,
        "explained_variance_interpolation": 0.4,
        "knn": 80.0,
        "knn_untrained": 40.0,
        "knn_pixels": 60.0,
        "linear": 85.0,
        "linear_untrained": 55.0,
        "linear_pixels": 65.0,
        "num_train": 1500,
        "num_val": 1000,
        "params_encoder": 1_230_000,
        "params_decoder": 45_600,
        "target": "normalised patches",
        "mask_ratio": 0.75,
        "data": "digits",
        "preset": "vit_digits",
        "input_size": [8, 8],
        "patch_size": [2, 2],
        "in_chans": 1,
    }
    return {**figures, **changes}


def environment(**changes: Any) -> dict[str, Any]:
    return {"torchmae": "0.1.0", "torch": "2.9.0", "device": "cpu", "command": "torchmae pretrain", **changes}


def write_pictures(folder: Path, steps: tuple[int, ...], count: int = 5) -> None:
    images = np.random.default_rng(0).random((count, 1, 8, 8), dtype=np.float32)
    masked = images.copy()
    masked[..., :4, :] = np.nan
    for step in steps:
        reconstruction_grid(masked, images, images, folder / f"step-{step:08d}.png", min_side=16, note=NOTE)


def write_run(folder: Path) -> None:
    """A finished run with labels, two pictures and every file."""
    folder.mkdir()
    config = json.loads(json.dumps(asdict(PretrainConfig(recipe="digits", batch_size=128))))
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    write_metrics(folder, [*train_records(), *val_records()])
    (folder / "summary.json").write_text(json.dumps(summary()))
    (folder / "environment.json").write_text(json.dumps(environment()))
    write_pictures(folder / "reconstructions", (50, 100))


def write_metrics(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
