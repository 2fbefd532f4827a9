from __future__ import annotations

import math
from math import cos, pi, sqrt

import pytest
import torch
from torch import nn

from torchmae import presets
from torchmae.config import OptimConfig
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.training.optim import (
    build_optimizers,
    copy_matrices,
    gradient_norm,
    lr_factor,
    peak_lr,
    set_lr,
    update_to_weight,
)


def model() -> MaskedAutoencoder:
    return presets.build("vit_digits", depth=2, embed_dim=8, num_heads=2, decoder_embed_dim=8, decoder_num_heads=2)


def test_the_learning_rate_scales_with_the_batch() -> None:
    assert peak_lr(OptimConfig(base_lr=1.5e-4), 4096) == pytest.approx(2.4e-3)  # paper, table 8
    assert peak_lr(OptimConfig(base_lr=1.5e-4), 256) == 1.5e-4
    assert peak_lr(OptimConfig(base_lr=1.5e-4, lr=1e-3), 4096) == 1e-3


def test_warm_up_then_cosine() -> None:
    config = OptimConfig(warmup=0.4, min_lr=0.1)
    factors = [lr_factor(step, 10, config) for step in range(10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    by_hand = [0.1 + 0.9 * (1 + cos(pi * i / 6)) / 2 for i in range(6)]
    assert factors[4:] == pytest.approx(by_hand)
    assert factors[4] == 1.0
    assert factors[7] == pytest.approx(0.55)
    assert lr_factor(10, 10, config) == pytest.approx(0.1)  # where the next step would be: the schedule ends there


def test_warm_up_then_constant() -> None:
    config = OptimConfig(warmup=0.2, schedule="constant")
    assert [lr_factor(step, 10, config) for step in range(10)] == [0.5, *[1.0] * 9]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_no_warm_up(schedule: str) -> None:
    assert lr_factor(0, 10, OptimConfig(warmup=0, schedule=schedule)) == 1.0


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_run_of_one_step_learns(schedule: str, warmup: float) -> None:
    assert lr_factor(0, 1, OptimConfig(warmup=warmup, schedule=schedule)) == 1.0


def test_warm_up_all_the_way() -> None:
    assert [lr_factor(step, 4, OptimConfig(warmup=1)) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_adamw_decays_matrices_and_nothing_else() -> None:
    network = model()
    (optimizer,) = build_optimizers(network, OptimConfig(base_lr=1e-3, weight_decay=0.07, betas=(0.8, 0.9)), 512)
    assert type(optimizer) is torch.optim.AdamW
    names = {id(p): name for name, p in network.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert decayed | plain == {name for name, p in network.named_parameters() if p.requires_grad}
    assert not decayed & plain
    assert {name for name in plain if name.endswith("token")} == {"encoder.cls_token", "decoder.mask_token"}
    assert all(name.endswith(("bias", "token")) or "norm" in name for name in plain)
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.07, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["peak_lr"], group["betas"], group["fused"]) == (2e-3, 2e-3, (0.8, 0.9), True)
    assert "encoder.pos_embed" not in decayed | plain


def test_adam_is_the_plain_one() -> None:
    network = presets.build("mlp", hidden_dim=4)
    (optimizer,) = build_optimizers(network, OptimConfig(name="adam", lr=1e-3, betas=(0.9, 0.999), weight_decay=0), 128)
    assert type(optimizer) is torch.optim.Adam
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-8}


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    network = model()
    muon, adamw = build_optimizers(network, OptimConfig(name="muon", muon_lr=0.02, base_lr=1e-3), 256)
    assert isinstance(muon, torch.optim.Muon)
    names = {id(p): name for name, p in network.named_parameters()}
    hidden = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    leaves = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    blocks = [f"{part}.blocks.{i}" for part in ("encoder", "decoder") for i in range(2)]
    assert hidden == {f"{block}.{leaf}.weight" for block in blocks for leaf in leaves}
    assert hidden | rest == {name for name, p in network.named_parameters() if p.requires_grad}
    assert not hidden & rest
    assert muon.param_groups[0]["peak_lr"] == 0.02
    assert adamw.param_groups[0]["peak_lr"] == 1e-3


def test_muon_moves_a_matrix_by_about_its_learning_rate() -> None:
    # Its update is orthogonal up to rounding, scaled to the root mean square that AdamW's has (0.2).
    network = model()
    optimizers = build_optimizers(network, OptimConfig(name="muon", muon_lr=0.01, weight_decay=0), 256)
    weight = network.get_parameter("encoder.blocks.0.mlp.fc1.weight")
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizers[0].step()
    moved = (weight.detach() - before).square().mean().sqrt()
    assert moved.item() == pytest.approx(0.01 * 0.2, rel=0.2)


def test_set_lr_is_a_share_of_each_groups_peak() -> None:
    optimizers = build_optimizers(model(), OptimConfig(name="muon", muon_lr=0.02, base_lr=1e-3), 256)
    set_lr(optimizers, 0.5)
    assert [group["lr"] for item in optimizers for group in item.param_groups] == [0.01, 5e-4, 5e-4]
    set_lr(optimizers, 1.0)
    assert [group["lr"] for item in optimizers for group in item.param_groups] == [0.02, 1e-3, 1e-3]


def test_gradient_norm() -> None:
    network = torch.nn.Linear(2, 2)
    network.weight.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    network.bias.grad = torch.tensor([5.0, 3.0])
    assert gradient_norm(network).item() == pytest.approx(8.0)
    network.bias.grad = None
    assert gradient_norm(network).item() == pytest.approx(sqrt(30))


def test_the_ratio_is_of_norms_over_all_matrices() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    before = copy_matrices(model)
    assert [tuple(matrix.shape) for matrix in before] == [(2, 2), (1, 2)]
    with torch.no_grad():
        model[0].weight += 0.3
        model[2].weight -= 0.6
        for vector in (model[0].bias, model[1].weight, model[2].bias):
            vector += 100
    expected = math.sqrt(4 * 0.3**2 + 2 * 0.6**2) / math.sqrt(6 * 3.0**2)
    assert update_to_weight(before, model).item() == pytest.approx(expected)


def test_a_step_of_sgd_is_as_large_as_its_learning_rate_says() -> None:
    model = nn.Linear(4, 3)
    before = copy_matrices(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(torch.randn(5, 4)).square().mean().backward()
    gradient, weight = model.weight.grad, before[0]
    assert gradient is not None
    optimizer.step()
    expected = 0.01 * (gradient.norm() / weight.norm()).item()
    assert update_to_weight(before, model).item() == pytest.approx(expected, rel=1e-4)


def test_frozen_weights_and_no_update() -> None:
    model = nn.Linear(4, 3)
    model.weight.requires_grad_(False)
    assert copy_matrices(model) == []
    model.weight.requires_grad_(True)
    assert update_to_weight(copy_matrices(model), model).item() == 0
