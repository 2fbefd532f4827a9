from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from small import RUNTIME, vit
from torch import nn

from torchmae.building import pretrain_settings
from torchmae.config import PretrainConfig, RefineConfig
from torchmae.errors import ConfigError, TrainingError
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.settings import parse
from torchmae.training import pretrain
from torchmae.training.parallel import blocks
from torchmae.training.pretrain import fit_batch
from torchmae.training.pretrain_task import PretrainSettings, PretrainTask
from torchmae.training.ranks import Ranks
from torchmae.training.refine import RefineTask
from torchmae.training.runtime import Runtime

SETTINGS = pretrain_settings(PretrainConfig(), vit())


@pytest.mark.parametrize(("room", "limit", "share"), [(1, 100, 1), (5, 100, 4), (64, 100, 64), (1000, 100, 64)])
def test_the_largest_power_of_two_that_fits(room: int, limit: int, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def fits(settings: PretrainSettings, model: MaskedAutoencoder, shape: tuple[int, ...], runtime: Runtime) -> bool:
        tried.append(shape[0])
        return shape[0] <= room

    monkeypatch.setattr(pretrain, "step_fits", fits)
    monkeypatch.setattr(Ranks, "all_reduce_max", lambda self, *values: list(values))
    for world_size in (1, 4):  # every rank gets the same share
        runtime = Runtime(torch.device("cuda"), "fp32", 1, Ranks(0, world_size, 0, world_size))
        tried.clear()
        size = fit_batch(SETTINGS, vit(), (1, 8, 8), limit * world_size, runtime)
        assert size == share * world_size
        assert tried == sorted(tried)
        assert tried[-1] <= min(2 * share, limit)
    room = 0
    with pytest.raises(TrainingError, match="^not one image fits in the GPU's memory; choose a smaller model"):
        fit_batch(SETTINGS, vit(), (1, 8, 8), limit, runtime)


def test_a_processor_is_not_measured() -> None:
    with pytest.raises(
        ConfigError, match="'auto', which measures a GPU's memory, and the device is cpu; give a number"
    ):
        fit_batch(SETTINGS, vit(), (1, 8, 8), 64, RUNTIME)


def test_a_tried_step_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[weakref.ref[nn.Module]] = []

    def task(settings: PretrainSettings, model: MaskedAutoencoder, runtime: Runtime, batch_size: int) -> PretrainTask:
        assert runtime.ranks.world_size == 1  # or one rank that runs out of memory would leave the others waiting
        copies.append(weakref.ref(blocks(model)[0]))
        return PretrainTask(settings, model, runtime, batch_size)

    monkeypatch.setattr(pretrain, "PretrainTask", task)
    runtime = replace(RUNTIME, ranks=Ranks(0, 2, 0, 2))
    pretrain.try_step(SETTINGS, vit(), (3, 1, 8, 8), runtime)  # torch keeps frames of its first optimiser
    gc.disable()
    try:
        pretrain.try_step(replace(SETTINGS, checkpoint_activations=True), vit(), (3, 1, 8, 8), runtime)
        assert copies[1]() is None
    finally:
        gc.enable()


def test_a_step_of_each_stage_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[type] = []
    monkeypatch.setattr(pretrain, "train_step", lambda task, inputs: tried.append(type(task)))
    pretrain.try_step(replace(SETTINGS, refine=RefineConfig(share=0.5)), vit(), (3, 1, 8, 8), RUNTIME)
    assert tried == [PretrainTask, RefineTask]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")
def test_a_step_is_tried_and_the_model_left_alone() -> None:
    model = vit().cuda()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runtime = Runtime(torch.device("cuda"), "fp32", 1)
    assert fit_batch(SETTINGS, model, (1, 8, 8), 64, runtime) == 64
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "words", [["--batch", "auto"], ["--batch=auto"], ["--batch-size", "auto"], ["--fit_batch=true"]]
)
def test_how_it_is_asked_for(words: list[str]) -> None:
    config = parse(words)
    assert (config.fit_batch, config.batch_size) == (True, PretrainConfig().batch_size)
