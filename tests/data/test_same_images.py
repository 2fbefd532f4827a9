"""The same images from a folder, from parquet, from tar shards and from a mapped array: the same loss curve."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import torchmae
from torchmae.config import PackOptions
from torchmae.data.layouts import folder_splits, open_splits
from torchmae.data.packing import pack
from torchmae.data.sources import Source

COUNT = 200


def images_of(name: str, request: pytest.FixtureRequest) -> Source:
    if name == "digits":
        return open_splits("digits")["train"]
    return open_splits(str(request.getfixturevalue("shared_data") / "cifar10"))["train"]


def losses(data: Path, out: Path, cache: str) -> list[float]:
    torchmae.pretrain(
        {"source": data, "cache": cache, "num_workers": 0, "val": "none"},
        recipe="digits",
        out=out,
        epochs=2,
        batch_size=40,
        log_every=1,
        progress="none",
    )
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line.get("kind") == "train"]


@pytest.mark.parametrize(("name", "cache"), [("digits", "none"), ("cifar10", "memory")])
def test_the_loss_curve_does_not_depend_on_the_format(
    tmp_path: Path, name: str, cache: str, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("pyarrow")
    source = images_of(name, request)
    folder = tmp_path / "folder"
    for i in range(COUNT):
        path = folder / str(source.labels[i]) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.squeeze(source.read(i))).save(path)
    curves = {"folder": losses(folder, tmp_path / "run-folder", cache)}
    for form in ("parquet", "wds", "npy"):
        pack(folder_splits(folder), tmp_path / form, PackOptions(format=form))
        curves[form] = losses(tmp_path / form, tmp_path / f"run-{form}", cache)
    assert len(curves["folder"]) == 10
    assert len(set(curves["folder"])) == 10
    assert all(curve == curves["folder"] for curve in curves.values())
