"""A contender in a process of its own, with the threads and the memory allocator that its users have."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from torchmae.bench.contenders import OURS, Contender, build
from torchmae.bench.memory import MemoryMeter
from torchmae.bench.timing import StepClock, matrix_product_rate, seconds_of
from torchmae.config import PretrainConfig
from torchmae.errors import ConfigError
from torchmae.threads import wait_as_usual, wait_briefly
from torchmae.training.runtime import environment

_WARM_UP_STEPS = 3
_TURN_S = 1.0


@dataclass(frozen=True)
class Introduction:
    """What a contender says of itself after its first steps.

    Attributes:
        precision: "bf16" or "fp32".
        arguments: torchmae's, of the network.
        shape: (B, C, *size) of the images.
        first_step_s: seconds of the very first step, which compiles and allocates.
        peak_memory: bytes, None where they cannot be measured.
        environment: versions and machine.
    """

    precision: str
    arguments: dict[str, Any]
    shape: tuple[int, ...]
    first_step_s: float
    peak_memory: int | None
    environment: dict[str, str | int]


class Stage:
    """A contender in the process that it is built in.

    Args:
        code: whose step, as in `contenders.build`.
        config: its settings.
        steps: of a turn; None: as many as last about a second.

    Raises:
        ConfigError: as `contenders.build`, or a batch that does not fit into memory.
    """

    def __init__(self, code: str, config: PretrainConfig, steps: int | None) -> None:
        with _memory_suffices(config):
            self.contender = build(code, config)
            self._meter = MemoryMeter(self.contender)
            self._first_step_s = warm_up(self.contender)
        self._steps = steps

    def introduce(self) -> Introduction:
        """Which it is, and what its first steps took."""
        contender = self.contender
        return Introduction(
            precision=contender.runtime.precision,
            arguments=contender.arguments,
            shape=tuple(contender.images.shape),
            first_step_s=self._first_step_s,
            peak_memory=self._meter.peak(),
            environment=environment(contender.runtime),
        )

    def turn(self) -> float:
        """Images a second over some steps, after one that is not counted: the others' turns have cooled everything."""
        self.contender.run()
        if self._steps is None:
            self._steps = max(1, round(_TURN_S / seconds_of(self.contender.run, 1, self.contender.runtime.device)))
        return images_per_second(self.contender, self._steps)

    def peak(self) -> float:
        """Operations a second of a large matrix product in the contender's precision."""
        return matrix_product_rate(self.contender.runtime.device, self.contender.runtime.precision)

    def shares(self) -> dict[str, float]:
        """Where the time of a step goes."""
        return step_shares(self.contender)


class Process:
    """A `Stage` in another process: the same methods. A context manager; leaving it ends the process.

    torchmae's process has the threads that `torchmae` gives itself, a peer's those that torch gives its users.

    Args:
        code: as for `Stage`.
        config: likewise.
        steps: likewise.
    """

    def __init__(self, code: str, config: PretrainConfig, steps: int | None) -> None:
        self._config = config
        spawn = get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, code, config, steps), daemon=True)
        with _threads_of(code):
            self._process.start()
        theirs.close()

    def introduce(self) -> Introduction:
        """As `Stage.introduce`; the errors are those of building it."""
        found: Introduction = self._ask("introduce")
        return found

    def turn(self) -> float:
        """As `Stage.turn`."""
        return float(self._ask("turn"))

    def peak(self) -> float:
        """As `Stage.peak`."""
        return float(self._ask("peak"))

    def shares(self) -> dict[str, float]:
        """As `Stage.shares`."""
        found: dict[str, float] = self._ask("shares")
        return found

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join()

    def _ask(self, name: str) -> Any:
        try:
            self._pipe.send(name)
            answer = self._pipe.recv()
        except (EOFError, OSError):  # the kernel has killed it
            raise _too_large(self._config) from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def images_per_second(contender: Contender, steps: int) -> float:
    """The speed of some steps."""
    return len(contender.images) / seconds_of(contender.run, steps, contender.runtime.device)


def warm_up(contender: Contender) -> float:
    """Runs the first steps, which compile and allocate; seconds of the very first."""
    device = contender.runtime.device
    first = seconds_of(contender.run, 1, device)
    seconds_of(contender.run, _WARM_UP_STEPS - 1, device)
    return first


def step_shares(contender: Contender) -> dict[str, float]:
    """Where the time of a step goes; a few steps of their own, since every part is waited for."""
    clock = StepClock(contender.model, contender.optimizers, contender.runtime.device)
    for _ in range(_WARM_UP_STEPS):
        clock.run(contender.step)
    return clock.shares()


def _serve(pipe: Connection, code: str, config: PretrainConfig, steps: int | None) -> None:
    """Answers one word after another by the method of that name, errors included, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the asker's
    stage: Stage | None = None
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        try:
            stage = stage or Stage(code, config, steps)
            pipe.send(getattr(stage, name)())
        except Exception as error:
            pipe.send(error)


@contextmanager
def _threads_of(code: str) -> Iterator[None]:
    before = dict(os.environ)
    (wait_briefly if code == OURS else wait_as_usual)(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _memory_suffices(config: PretrainConfig) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _too_large(config) from error


def _too_large(config: PretrainConfig) -> ConfigError:
    return ConfigError(f"batches of {config.batch_size} do not fit into memory", "lower batch_size")
