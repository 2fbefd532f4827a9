from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from small import RUNTIME, images, mlp, train, vit

from torchmae import presets
from torchmae.building import pretrain_settings
from torchmae.config import MaskConfig, OptimConfig, PretrainConfig
from torchmae.data.loader import Batch, Plan
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.training.optim import build_optimizers
from torchmae.training.pretrain_task import PretrainTask
from torchmae.training.task import seeded
from torchmae.training.trainer import step_if_finite, train_step


@pytest.mark.parametrize("accumulate", [3, 4, 7])
@pytest.mark.parametrize(
    ("make", "strategy"),
    [
        (vit, "random"),
        (lambda: vit(norm_pix=True), "block"),
        (lambda: mlp(loss_on="hidden"), "elements"),
        (lambda: mlp(loss_on="all"), "elements_inverted"),
    ],
)
def test_parts_of_a_batch_make_the_step_of_the_whole(
    make: Callable[[], MaskedAutoencoder], strategy: str, accumulate: int
) -> None:
    batch = next(images(7).train_batches(Plan(7, 7, 0), 0, 1))
    results = []
    for parts in (1, accumulate):
        model = make()
        config = PretrainConfig(
            batch_size=7,
            accumulate=parts,
            mask=MaskConfig(strategy=strategy),
            optim=OptimConfig(lr=0.01, clip_grad=0.5),
        )
        task = PretrainTask(
            pretrain_settings(replace(config, optim=replace(config.optim, name="adam")), model), model, RUNTIME, 7
        )
        for group in task.optimizers[0].param_groups:
            group["eps"] = 1.0  # else Adam's division by tiny gradients would enlarge what rounding leaves
        mask = Masker(model.encoder, **asdict(config.mask))(0, batch.epoch, batch.indices, torch.device("cpu"))
        loss, norm, losses = train_step(task, (batch.images, mask))
        assert losses.tolist() == [loss]
        assert all(p.grad is None for p in model.parameters())
        results.append((loss.item(), norm.item(), [p.detach() for p in model.parameters()]))
    (loss, norm, weights), (parts_loss, parts_norm, parts_weights) = results
    assert parts_loss == pytest.approx(loss, abs=1e-6)
    assert parts_norm == pytest.approx(norm, rel=1e-6)
    for one, other in zip(weights, parts_weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_gradients_are_clipped_and_the_norm_is_that_before() -> None:
    batch = next(images(7).train_batches(Plan(7, 7, 0), 0, 1))

    def step(limit: float | None) -> tuple[float, float]:
        """The norm that is returned, and how far plain gradient descent goes."""
        model = vit()
        before = [p.detach().clone() for p in model.parameters()]
        config = PretrainConfig(batch_size=7, optim=OptimConfig(clip_grad=limit))
        mask = Masker(model.encoder, **asdict(config.mask))(0, batch.epoch, batch.indices, torch.device("cpu"))
        task = PretrainTask(pretrain_settings(config, model), model, RUNTIME, 7)
        task.optimizers = [torch.optim.SGD(model.parameters(), lr=1.0)]
        norm = train_step(task, (batch.images, mask)).norm
        moved = torch.cat([(p - old).flatten() for p, old in zip(model.parameters(), before, strict=True)])
        return norm.item(), moved.norm().item()

    norm, moved = step(None)
    assert moved == pytest.approx(norm, rel=1e-4)
    assert step(norm / 4) == pytest.approx((norm, norm / 4), rel=1e-4)
    assert step(norm * 2) == pytest.approx((norm, norm), rel=1e-4)


def test_masks_are_cut_as_batches_are() -> None:
    model = vit()
    batch = next(images(7).train_batches(Plan(7, 7, 0), 0, 1))
    mask = Masker(model.encoder, **asdict(MaskConfig()))(0, batch.epoch, batch.indices, torch.device("cpu"))
    parts = mask.tensor_split(3)
    assert [len(part.ids_keep) for part in parts] == [len(part) for part in batch.images.tensor_split(3)] == [3, 2, 2]
    assert torch.equal(torch.cat([part.ids_masked for part in parts]), mask.ids_masked)


def test_a_mask_depends_on_seed_epoch_and_index_alone() -> None:
    model, cpu = vit(), torch.device("cpu")
    one = Batch(torch.zeros(3, 1, 8, 8), torch.zeros(3), torch.tensor([5, 1, 9]).numpy(), 2)
    other = Batch(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.tensor([9, 5]).numpy(), 2)
    first = Masker(model.encoder, **asdict(MaskConfig()))(3, one.epoch, one.indices, cpu).ids_keep
    assert torch.equal(
        first[[2, 0]], Masker(model.encoder, **asdict(MaskConfig()))(3, other.epoch, other.indices, cpu).ids_keep
    )
    assert not torch.equal(
        first, Masker(model.encoder, **asdict(MaskConfig()))(4, one.epoch, one.indices, cpu).ids_keep
    )
    assert not torch.equal(
        first,
        Masker(model.encoder, **asdict(MaskConfig()))(
            3, replace(one, epoch=3).epoch, replace(one, epoch=3).indices, cpu
        ).ids_keep,
    )


@pytest.mark.parametrize("loss, norm", [(1.0, math.nan), (math.inf, 1.0), (math.nan, math.nan)])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing(name: str, loss: float, norm: float) -> None:
    model = vit()
    optimizers = build_optimizers(model, OptimConfig(name=name, lr=0.1), 4)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    before = [p.detach().clone() for p in model.parameters()]
    step_if_finite(optimizers, torch.tensor(loss), torch.tensor(norm))
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert all(not optimizer.state for optimizer in optimizers)


def test_weights_are_a_function_of_the_seed_while_another_thread_trains(tmp_path: Path) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        with seeded(seed):
            return presets.build("vit_digits", depth=1).state_dict()

    alone = weights(3)
    config = PretrainConfig(epochs=8, batch_size=2)
    training = threading.Thread(target=train, args=(config, vit(drop_path=0.5), images(8), tmp_path))
    training.start()
    built = 0
    while training.is_alive() or not built:
        assert all(torch.equal(value, alone[name]) for name, value in weights(3).items())
        built += 1
    training.join()


def test_seeding_is_that_of_torch() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    with seeded(5, torch.device("cpu")):
        assert torch.equal(torch.rand(3), expected)
