from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import RUNTIME, vit

import torchmae
from torchmae.building import check_parallel, check_views, pretrain_settings
from torchmae.config import PretrainConfig
from torchmae.config.base import make
from torchmae.data.loader import Batch
from torchmae.data.transforms import Normalisation
from torchmae.errors import ConfigError, Interrupted
from torchmae.nn.contrast import Contrast
from torchmae.training.checkpoint import load_checkpoint
from torchmae.training.refine import COLOUR_NUMBERS, RefineTask, autoencoder_of, changed_colours
from torchmae.training.state import State

RUN: dict[str, Any] = {
    "recipe": "digits",
    "epochs": 2,
    "batch_size": 256,
    "log_every": 1,
    "data.val": "none",
    "progress": "none",
    "device": "cpu",
    "precision": "fp32",
    "threads": 1,
}

REFINE = {"share": 0.5, "lr_ratio": 2.0}


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("views", [2, 4])
def test_the_loss_is_that_of_picking_another_view(views: int) -> None:
    contrast = Contrast(6, 0.5, views)
    features = torch.randn(8, 6)
    z = F.normalize(contrast.head(features), dim=1)
    losses = []
    for i in range(8):
        image = range(i // views * views, (i // views + 1) * views)
        for other in image:
            if other != i:
                scores = torch.stack([z[i] @ z[j] / 0.5 for j in range(8) if j not in image or j == other])
                losses.append(torch.logsumexp(scores, 0) - z[i] @ z[other] / 0.5)
    assert contrast(features).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_one_image_has_no_others_and_teaches_nothing() -> None:
    contrast = Contrast(6, 0.1, 2)
    loss = contrast(torch.randn(2, 6))
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(weight.grad, torch.zeros_like(weight)) for weight in contrast.parameters())


@pytest.mark.parametrize("shape", [(64, 3, 8, 8), (64, 1, 40), (64, 5, 4, 4, 4)])
def test_colours_change_and_nothing_else(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape)
    offset = torch.rand(shape[1], *[1] * (len(shape) - 2))
    numbers = torch.rand(len(images), COLOUR_NUMBERS + shape[1])
    torch.testing.assert_close(changed_colours(images, offset, numbers, 0, 0), images)
    changed = changed_colours(images, offset, numbers, 1, 0)
    for one, other in zip(images, changed, strict=True):  # each is a linear map of an image's channels
        known = torch.stack([*one.flatten(1), torch.ones(one[0].numel())])
        for channel in other.flatten(1):
            found = torch.linalg.lstsq(known.T, channel[:, None]).solution
            torch.testing.assert_close(known.T @ found, channel[:, None], atol=1e-3, rtol=1e-3)
    values = images + offset
    grey = changed_colours(images, offset, numbers, 0, 1) + offset
    torch.testing.assert_close(grey, values.mean(1, keepdim=True).expand_as(values))
    numbers[:] = 0.5
    numbers[:, 0] = 1
    torch.testing.assert_close(changed_colours(images, offset, numbers, 1, 0), values * 1.4 - offset)


def test_a_run_is_refined_at_its_end_and_resumed_in_either_stage(tmp_path: Path, monkeypatch: Any) -> None:
    whole = torchmae.pretrain(**RUN, refine=REFINE, out=tmp_path / "whole")
    steps = whole.figures["steps"]
    lines = records(whole.path, "train")
    assert steps == 2 * math.ceil(1437 / 256)
    assert [line["step"] for line in lines if "loss_contrast" in line] == [
        line["step"] for line in lines if line["step"] > steps / 2
    ]
    rates = [line["lr"] for line in lines]
    assert rates[steps // 2 :] == pytest.approx([2 * rate for rate in rates[: steps // 2]])  # the schedule again
    weights = torchmae.load(whole.path).model.state_dict()
    assert weights.keys() == torchmae.build("vit_digits").state_dict().keys()  # the projection is gone
    for stop in (steps // 2, steps * 3 // 4):
        out = tmp_path / str(stop)
        checkpoint = stopped(lambda state, stop=stop: state.step == stop - 1, monkeypatch, refine=REFINE, out=out)
        assert checkpoint.state["stage"] == (stop > steps // 2)
        assert autoencoder_of(checkpoint.model).keys() == weights.keys()
        (out / "model.safetensors").unlink()
        assert torchmae.load(out).model.state_dict().keys() == weights.keys()  # of the checkpoint
        torchmae.pretrain(resume=out)
        for name, weight in torchmae.load(out).model.state_dict().items():
            assert torch.equal(weight, weights[name]), name


def stopped(due: Callable[[State], bool], monkeypatch: Any, **options: Any) -> Any:
    """The checkpoint of a run that gets a signal in the first step that is `due`."""
    from torchmae.training import trainer

    original = trainer.batches_to_come

    def batches(loader: Any, plan: Any, state: State, *others: Any) -> Any:
        for batch in original(loader, plan, state, *others):
            if due(state):
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(trainer, "batches_to_come", batches)
        torchmae.pretrain(**RUN, **options)
    checkpoint = load_checkpoint(options["out"] / "checkpoints")
    assert checkpoint is not None
    return checkpoint


def test_a_timed_run_that_was_stopped_keeps_its_stage_s_steps_and_divides_what_is_left(
    tmp_path: Path, monkeypatch: Any
) -> None:
    timed = {"refine": {"share": 0.5}, "max_minutes": 0.02}
    early, late = tmp_path / "early", tmp_path / "late"
    checkpoint = stopped(lambda state: state.step == 1, monkeypatch, **timed, out=early)
    first = checkpoint.state["first_steps"]
    steps = torchmae.pretrain(resume=early).figures["steps"]
    assert [line["step"] for line in records(early, "train") if "loss_contrast" in line] == [
        *range(first + 1, steps + 1)
    ]
    assert steps > first
    checkpoint = stopped(lambda state: state.stage == 1, monkeypatch, **timed, out=late)
    assert checkpoint.state["step"] == checkpoint.state["first_steps"] + 1
    assert torchmae.pretrain(resume=late).figures["steps"] == checkpoint.state["total_steps"]


def test_black_is_what_pictures_show_black() -> None:
    settings = make(PretrainConfig, {"refine.share": 0.5})
    kelvin = Normalisation((280.0,), (10.0,), (250.0,), (300.0,), {"float32": 1.0}, "dataset")
    loader: Any = SimpleNamespace(view=SimpleNamespace(crop_ratio=(1.0, 1.0), flip=False), normalisation=kelvin)
    task = RefineTask(pretrain_settings(settings, vit()), vit(), RUNTIME, 8, loader=loader)
    assert kelvin.apply(torch.full((1, 1, 1, 1), 250.0)).item() == pytest.approx(-task._offset.item())


def test_views_of_images_with_holes_have_nothing_there_and_show_what_there_is() -> None:
    settings = make(PretrainConfig, {"refine.share": 0.5, "refine.views": 3, "refine.colour": 0.0, "refine.grey": 0.0})
    model = vit()
    task = RefineTask(pretrain_settings(settings, model), model, RUNTIME, 8, loader=None)
    valid = torch.ones(8, 1, 8, 8, dtype=torch.bool)
    valid[..., :4] = False
    batch = Batch(torch.full((8, 1, 8, 8), 5.0) * valid, torch.full((8,), -1), np.arange(8), 0, valid)
    views, kept = task._views(batch)
    assert views.shape == (8, 3, 1, 8, 8)
    there = views != 0
    torch.testing.assert_close(views[there], torch.full_like(views[there], 5.0))
    assert 0 < there.sum() < there.numel()
    patch = model.patch_size[0]
    full = F.max_pool2d(there.flatten(0, 1).float(), patch).flatten(1)
    shown = full.gather(1, kept.flatten(0, 1)).sum(1)
    torch.testing.assert_close(shown, full.sum(1).clamp(max=kept.shape[-1]))


def test_volumes_and_images_with_holes_are_refined(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 1, (40, 16, 16, 2)).astype(np.float32)
    images[:, :5, :5] = np.nan
    np.save(tmp_path / "holes.npy", images)
    np.save(tmp_path / "volumes.npy", rng.uniform(0, 1, (40, 8, 8, 8, 1)).astype(np.float32))
    for name, size, patch in (("holes", (16, 16), (4, 4)), ("volumes", (8, 8, 8), (4, 4, 4))):
        run = torchmae.pretrain(
            tmp_path / f"{name}.npy",
            **{**RUN, "batch_size": 8},
            model={"input_size": size, "patch_size": patch},
            refine={"share": 0.9, "views": 3},
            accumulate=2,
            out=tmp_path / name,
        )
        contrast = [line["loss_contrast"] for line in records(run.path, "train") if "loss_contrast" in line]
        assert len(contrast) > 4 and all(map(math.isfinite, contrast))


@pytest.mark.parametrize(
    "given",
    [
        {"recipe": "tutorial"},
        {"refine": {"share": 1.0}},
        {"refine": {"crop_scale": (0.5, 0.2)}},
        {"refine": {"views": 1}},
        {"data": {"repeats": 2}},
    ],
)
def test_what_cannot_be_refined(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        torchmae.pretrain(**{"refine": {"share": 0.5}, "progress": "none", "out": tmp_path / "run", **given})
    assert not (tmp_path / "run").exists()


def test_a_part_of_a_batch_has_images_to_compare() -> None:
    for accumulate, batch_size, ranks, fits in ((1, 2, 1, True), (1, 8, 8, False), (4, 16, 1, True), (5, 16, 1, False)):
        config = make(PretrainConfig, {"refine.share": 0.5, "accumulate": accumulate})
        if fits:
            check_views(config, batch_size, ranks)
        else:
            with pytest.raises(ConfigError):
                check_views(config, batch_size, ranks)
    check_views(make(PretrainConfig, {"accumulate": 8}), 8, 1)  # without views, one image is enough


def test_shards_are_not_refined() -> None:
    config = make(PretrainConfig, {"refine.share": 0.5, "parallel": "fsdp"})
    check_parallel(config, 1)
    with pytest.raises(ConfigError, match="fsdp"):
        check_parallel(config, 2)
