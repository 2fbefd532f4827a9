from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from torchmae.bench import timing
from torchmae.bench.timing import StepClock, matrix_product_rate, take_turns

CPU = torch.device("cpu")


class FakeTime:
    """A clock that moves only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    return FakeTime(monkeypatch)


def test_turns_alternate_and_every_round_gives_each_a_figure() -> None:
    order: list[str] = []
    rounds: list[int] = []

    def turn(name: str) -> float:
        order.append(name)
        return float(len(order))

    figures = take_turns({"a": lambda: turn("a"), "b": lambda: turn("b")}, 3, rounds.append)
    assert "".join(order) == "abbaab"
    assert figures == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert rounds == [1, 2, 3]


def test_seconds_are_those_of_one_of_many(clock: FakeTime) -> None:
    def work() -> None:
        clock.now += 2

    assert timing.seconds_of(work, 5, CPU) == 2


def test_the_rate_of_a_matrix_product_is_its_operations_over_its_time(
    clock: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes = []

    def product(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> None:
        dtypes.append((a.dtype, b.dtype, out.dtype))
        clock.now += 0.5

    monkeypatch.setattr(timing.torch, "mm", product)
    assert matrix_product_rate(CPU, "fp32", size=10) == 2 * 10**3 / 0.5
    assert set(dtypes) == {(torch.float32,) * 3}
    assert matrix_product_rate(CPU, "bf16", size=10) == 4000
    assert dtypes[-1] == (torch.bfloat16,) * 3


class Slow(nn.Module):
    """Its forward pass takes 3 seconds."""

    def __init__(self, clock: FakeTime) -> None:
        super().__init__()
        self.clock = clock
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self) -> torch.Tensor:
        self.clock.now += 3
        return self.weight * 2


class SlowOptimizer(torch.optim.SGD):
    """Its step takes 2 seconds."""

    clock: FakeTime

    def step(self, closure: Any = None) -> None:
        self.clock.now += 2
        super().step(closure)


def test_a_step_is_split_where_model_and_optimisers_are_called(clock: FakeTime) -> None:
    model = Slow(clock)
    optimizers = [SlowOptimizer(model.parameters(), lr=0.1) for _ in range(2)]
    for optimizer in optimizers:
        optimizer.clock = clock

    def step(model: Any, optimizers: Any) -> None:
        clock.now += 1  # mask
        for _ in range(2):  # accumulation
            loss = model()
            clock.now += 5  # backward
            loss.backward()
        assert len(list(model.parameters())) == 1  # whatever else a step asks of its model
        for optimizer in optimizers:
            optimizer.told = 0.0  # as a step tells fused ones what a GPU found
            optimizer.step()
            optimizer.zero_grad()

    steps = StepClock(model, optimizers, CPU)
    for _ in range(3):
        steps.run(step)
    assert steps.seconds == {"mask": 3, "forward": 18, "backward": 30, "optimiser": 12}
    assert sum(steps.shares().values()) == pytest.approx(1)
    assert steps.shares()["backward"] == pytest.approx(30 / 63)
    assert [vars(optimizer)["told"] for optimizer in optimizers] == [0.0, 0.0]
    assert model.weight.grad is None and model.weight.item() != 1  # the real ones did the work
