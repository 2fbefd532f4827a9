"""Clocks: turns of several contenders, the parts of a training step, and what the processor could do at best."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

PHASES = ("mask", "forward", "backward", "optimiser")

_PEAK_SIZE = {"cpu": 2048, "cuda": 8192}  # rows of the matrices: large enough to fill the machine
_SMALL_SIZE = 256
_PRODUCT_S = 1.0  # of one product on a processor, at most
_PEAK_REPEATS = {"cpu": 2, "cuda": 10}


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def take_turns(
    turns: Mapping[str, Callable[[], float]], rounds: int, after_round: Callable[[int], None]
) -> dict[str, list[float]]:
    """Runs every turn once a round, so that what else the machine does slows all of them alike.

    Args:
        turns: each returns its figure.
        rounds: how many.
        after_round: called with the number of rounds done.

    Returns:
        the figures of each, one a round. Every second round goes backwards: none always comes first.
    """
    figures: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(rounds):
        for name in list(turns)[:: 1 if i % 2 == 0 else -1]:
            figures[name].append(turns[name]())
        after_round(i + 1)
    return figures


def seconds_of(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Mean wall-clock seconds of `work`, done `times` times, waiting for the device before and after all of them."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronise(device)
    return (time.perf_counter() - start) / times


def matrix_product_rate(device: torch.device, precision: str, size: int | None = None) -> float:
    """Floating-point operations a second of one large square matrix product.

    Args:
        device: where.
        precision: "bf16" or "fp32", of the factors.
        size: rows; None: enough to fill the device, but on a processor that has no instructions for the precision no
            more than it multiplies in about a second.
    """
    if size is not None:
        return _product_rate(device, precision, size)
    rows = _PEAK_SIZE.get(device.type, 2048)
    if device.type == "cpu":
        operations = _product_rate(device, precision, _SMALL_SIZE) * _PRODUCT_S
        while rows > _SMALL_SIZE and 2 * rows**3 > operations:
            rows //= 2
    return _product_rate(device, precision, rows)


def _product_rate(device: torch.device, precision: str, rows: int) -> float:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> None:
        torch.mm(a, b, out=out)

    product()
    return 2 * rows**3 / seconds_of(product, _PEAK_REPEATS.get(device.type, 2), device)


class StepClock:
    """Splits the time of training steps into parts.

    The step is run with `model` and `optimizers` in place of its own, which note when they are called: whatever the
    step does, what lies before the first forward pass counts as "mask", and what lies between forward passes and the
    optimisers' steps as "backward" (gradient norm and clipping included).

    Args:
        model: the step's own.
        optimizers: likewise.
        device: waited for at every boundary.
    """

    def __init__(self, model: Any, optimizers: Sequence[Optimizer], device: torch.device) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.model: Any = _Timed(model, self, "forward", "backward")
        self.optimizers: list[Any] = [
            _Timed(optimizer, self, "optimiser", "optimiser", ("step", "zero_grad")) for optimizer in optimizers
        ]
        self._device = device
        self._phase = "mask"
        self._since = 0.0

    def run(self, step: Callable[[Any, Any], object]) -> None:
        """Runs and times one step."""
        synchronise(self._device)
        self._phase, self._since = "mask", time.perf_counter()
        step(self.model, self.optimizers)
        self.enter("mask")

    def enter(self, phase: str) -> None:
        """The part in hand ends and `phase` begins."""
        synchronise(self._device)
        now = time.perf_counter()
        self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def shares(self) -> dict[str, float]:
        """The share of each part in the time of all steps; they add up to 1."""
        total = sum(self.seconds.values())
        return {phase: seconds / total for phase, seconds in self.seconds.items()}


class _Timed:
    """Stands for an object; a call of it, or of some of its methods, tells a clock when it begins and ends."""

    def __init__(self, wrapped: Any, clock: StepClock, during: str, after: str, methods: Sequence[str] = ()) -> None:
        own = {"_wrapped": wrapped, "_clock": clock, "_during": during, "_after": after, "_methods": methods}
        vars(self).update(own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._wrapped, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._wrapped, name)
        if name in self._methods:
            return lambda *args, **kwargs: self._run(value, args, kwargs)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._wrapped, name, value)  # such as an optimiser's found_inf

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._clock.enter(self._during)
        result = function(*args, **kwargs)
        self._clock.enter(self._after)
        return result
