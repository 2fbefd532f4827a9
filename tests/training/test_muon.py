from __future__ import annotations

import torch
from torch import nn

from torchmae.training.muon import BatchedMuon, orthogonalise

SHAPES = ((24, 8), (8, 8), (32, 8), (8, 32), (8, 8), (24, 8))


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_it_is_pytorch_muon() -> None:
    ours, theirs = matrices(), matrices()
    batched = BatchedMuon(ours, lr=0.02, weight_decay=0.1)
    single = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = [parameter.detach().clone() for parameter in ours]
    for step in range(3):
        for parameters in (ours, theirs):
            give_gradients(parameters, step)
        batched.step()
        single.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        moved = (b - before).abs().max()
        assert moved > 0.01
        assert (a - b).abs().max() <= 0.02 * moved  # bf16 inside
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(batched.state[a]["momentum_buffer"], single.state[b]["momentum_buffer"])


def test_a_matrix_without_gradient_stays() -> None:
    parameters = matrices()
    give_gradients(parameters, 0)
    parameters[1].grad = None
    before = parameters[1].detach().clone()
    optimizer = BatchedMuon(parameters, lr=0.02, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(parameters[1], before)
    assert parameters[1] not in optimizer.state


def test_its_state_is_pytorch_muons() -> None:
    ours, theirs = matrices(), matrices()
    single = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    give_gradients(theirs, 0)
    single.step()
    batched = BatchedMuon(ours, lr=0.5, weight_decay=0.0)
    batched.load_state_dict(single.state_dict())
    assert batched.param_groups[0]["lr"] == 0.02
    assert torch.equal(batched.state[ours[0]]["momentum_buffer"], single.state[theirs[0]]["momentum_buffer"])


def test_singular_values_come_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 16, 64, generator=generator).bfloat16()
    values = torch.linalg.svdvals(orthogonalise(stack, (3.4445, -4.7750, 2.0315), 5, 1e-7).float())
    assert values.min() > 0.5
    assert values.max() < 1.4
