"""What only a GPU can show: that it computes what the processor does, whichever way images reach it.

Skipped without one. TORCHMAE_TEST_DEVICE=cpu runs them on the processor, to try the tests themselves.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torchmae
from torchmae import presets
from torchmae.building import pretrain_settings
from torchmae.config import DataConfig, OptimConfig, PretrainConfig
from torchmae.data.loader import Batch, Plan
from torchmae.data.opening import open_data
from torchmae.nn.masking import Masker
from torchmae.training.pretrain_task import PretrainTask
from torchmae.training.runtime import open_runtime
from torchmae.training.trainer import train_step

DEVICE = os.environ.get("TORCHMAE_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="takes a GPU"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),  # Python 3.12 and 3.13
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # torch 2.11's own compiler
]
TINY = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


def array(folder: Path, dtype: Any, size: tuple[int, ...] = (20, 24), count: int = 40) -> Path:
    """Noise in two classes: dark and bright."""
    random, labels = np.random.default_rng(0), np.arange(count) % 2
    high = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1.0
    values = (random.random((count, *size, 3)) + labels.reshape(-1, 1, 1, 1)) / 2 * high
    np.savez(folder / "images.npz", train_images=values.astype(dtype), train_labels=labels)
    return folder / "images.npz"


def batches(path: Path, device: str, **options: Any) -> list[Batch]:
    config = DataConfig(str(path), val="none", **options)
    data = open_data(config, input_size=(16, 16), channels=3, device=torch.device(device))
    found = list(data.train.train_batches(Plan(len(data.train), 8, 0), 0, 12))
    assert all(batch.images.device.type == device for batch in found)
    return found


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("options", [{"cache": "device"}, {"cache": "memory"}, {"cache": "none", "num_workers": 2}])
def test_batches_are_those_of_the_processor(tmp_path: Path, dtype: Any, options: dict[str, Any]) -> None:
    path = array(tmp_path, dtype)
    ours = batches(path, DEVICE, **options)
    theirs = batches(path, "cpu", **{**options, "cache": options["cache"].replace("device", "memory")})
    for one, other in zip(ours, theirs, strict=True):
        assert one.labels.cpu().equal(other.labels)
        torch.testing.assert_close(one.images.cpu(), other.images, atol=0.02, rtol=0)  # a level, where rounding tips


def losses(device: str, precision: str, **changes: Any) -> list[float]:
    runtime = open_runtime(device, precision, None)
    torch.manual_seed(0)
    model = presets.construct(presets.arguments("vit_tiny_32_p4", **TINY)).to(runtime.device)
    config = PretrainConfig(optim=OptimConfig(lr=1e-3, **changes))
    task = PretrainTask(pretrain_settings(config, model), model, runtime, 8)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(runtime.device)
    found = []
    for step in range(10):
        batch = Batch(images, torch.zeros(8), np.arange(8), step)
        mask = Masker(model.encoder, **asdict(config.mask))(0, batch.epoch, batch.indices, runtime.device)
        # A step whose numbers are not finite leaves everything alone, which fused optimisers decide on the device.
        spoilt = images * torch.nan if step == 5 else images
        found.append(train_step(task, (spoilt, mask)).loss.item())
    assert np.isnan(found.pop(5))
    return found


@pytest.mark.parametrize(("precision", "rel"), [("fp32", 1e-3), ("bf16", 2e-2)])
@pytest.mark.parametrize("changes", [{}, {"name": "muon"}, {"clip_grad": 0.1}], ids=str)
def test_steps_are_those_of_the_processor(precision: str, rel: float, changes: dict[str, Any]) -> None:
    assert losses(DEVICE, precision, **changes) == pytest.approx(losses("cpu", "fp32", **changes), rel=rel)


@pytest.mark.parametrize(
    "options",
    [{}, {"data": {"cache": "none", "num_workers": 2}}, {"compile": True}, {"compile": True, "refine": {"share": 0.5}}],
    ids=str,
)
def test_a_run_learns_and_goes_on(tmp_path: Path, options: dict[str, Any]) -> None:
    data = {"source": str(array(tmp_path, np.uint8, (32, 32), 200)), **options.pop("data", {})}
    common = {"model": {"preset": "vit_tiny_32_p4", **TINY}, "eval": {"count": 2, "images": 20}, "batch_size": 32}
    run = torchmae.pretrain(
        data=data,
        out=tmp_path / "run",
        epochs=6,
        device=DEVICE,
        progress="none",
        **common,
        **options,
    )
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    epochs = [line["loss"] for line in lines if line["kind"] == "epoch"]
    assert len(epochs) == 6
    assert epochs[-1] < epochs[0]
    figures = torchmae.evaluate(run.path, method="all", device=DEVICE, attentive={"epochs": 2})
    assert figures["knn20"] == 100.0  # dark or bright
    model = torchmae.load(run.path)
    assert model.encode(torch.zeros(2, 3, 32, 32)).shape == (2, 32)


@pytest.mark.parametrize("compiled", [False, True])
def test_fine_tuning(tmp_path: Path, compiled: bool) -> None:
    data = str(array(tmp_path, np.uint8, (32, 32), 100))
    model = {"preset": "vit_tiny_32_p4", **TINY}
    run = torchmae.pretrain(data, out=tmp_path / "run", epochs=1, model=model, device=DEVICE, progress="none")
    settings = {"epochs": 5, "base_lr": 0.02, "batch_size": 16, "checkpoint_minutes": 0, "compile": compiled}
    figures = torchmae.evaluate(run.path, method="finetune", device=DEVICE, finetune=settings)
    assert figures["finetune"] > 80


@pytest.mark.skipif(DEVICE == "cpu", reason="a processor's memory is not measured")
def test_the_largest_batch_is_found_and_trained(tmp_path: Path) -> None:
    model = {"preset": "vit_tiny_32_p4", **TINY}
    data = str(array(tmp_path, np.uint8, (32, 32), 100))
    run = torchmae.pretrain(data, out=tmp_path / "run", epochs=1, model=model, batch_size="auto", progress="none")
    assert "batch_size: 64" in (run.path / "config.yaml").read_text()  # the largest power of two up to the 80 images
