"""The real training loop beside the bare step: what loading, logging and Python add."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median

from torchmae import presets
from torchmae.bench.contenders import OURS, Contender, build, model_arguments
from torchmae.bench.processes import images_per_second, step_shares, warm_up
from torchmae.bench.results import Report, Result
from torchmae.bench.step import title
from torchmae.config import PretrainConfig
from torchmae.config.bench import BenchTrain
from torchmae.data.formats import Progress
from torchmae.data.opening import Data, open_data
from torchmae.errors import Interrupted
from torchmae.training.pretrain import pretrain
from torchmae.training.progress import Display
from torchmae.training.run_folder import RunFolder
from torchmae.training.runtime import environment, open_runtime
from torchmae.training.trainer import Evaluator

BARE = "bare step"


def measure_train(config: PretrainConfig, options: BenchTrain, progress: Progress) -> Report:
    """Runs the loop of `torchmae pretrain` for a while, and now and then some bare steps on a fixed batch.

    Evaluations and checkpoints, which come a few times a run, are left out.

    Args:
        config: the run.
        options: how to measure.
        progress: told how far it is.

    Raises:
        TorchmaeError: as `torchmae pretrain`.
    """
    runtime = open_runtime(config.device, config.precision, config.threads)
    data = open_data(
        config.data,
        input_size=model_arguments(config)["input_size"],
        channels=config.model.in_chans,
        device=runtime.device,
        progress=progress,
    )
    config = replace(config, model=replace(config.model, in_chans=data.channels))
    bare = build(OURS, config)
    warm_up(bare)
    turns = _Turns(bare, options, progress)
    try:
        _run_loop(config, data, turns, options)
    finally:
        data.train.close()
    speed = median(turns.loop) / median(turns.bare)
    step = min(speed, 1 - turns.data_wait)
    shares = {name: share * step for name, share in step_shares(bare).items()}
    shares |= {"data": turns.data_wait, "loop": max(0.0, 1 - step - turns.data_wait)}
    where = "memory" if data.train.in_memory else "files"
    return Report(
        title=title(config, bare.images.shape),
        results=[Result(OURS, tuple(turns.loop), shares), Result(BARE, tuple(turns.bare), step_shares(bare))],
        notes=[
            f"The loop runs at {speed:.1%} of the speed of the bare step; {turns.data_wait:.1%} of its time it waits "
            f"for data, from {where}."
        ],
        environment=environment(runtime),
        settings=asdict(config),
    )


def _run_loop(config: PretrainConfig, data: Data, turns: _Turns, options: BenchTrain) -> None:
    """Runs the training loop until `turns` has seen enough."""
    steps_per_epoch = math.ceil(len(data.train) / config.batch_size)
    epochs = math.ceil((options.rounds + 2) * options.steps / steps_per_epoch)
    config = replace(config, epochs=epochs, max_minutes=None, checkpoint_minutes=math.inf)
    times = epochs * steps_per_epoch // options.steps
    runtime = turns.contender.runtime
    model = presets.construct(turns.contender.arguments).to(runtime.device)
    with tempfile.TemporaryDirectory() as place:
        try:
            pretrain(
                config,
                model=model,
                loader=data.train,
                fingerprint=data.fingerprint,
                runtime=runtime,
                folder=RunFolder(Path(place)),
                tracker=turns,
                display=Display("none"),
                evaluators=[Evaluator(times, turns.evaluate)],
            )
        except _Enough:
            pass
        except Interrupted as error:
            raise Interrupted("the benchmark was stopped", "run it again", error.exit_status - 128) from error


class _Enough(Exception):
    """Ends the loop."""


class _Turns:
    """As the loop's tracker it takes the loop's speed; as its evaluator it runs bare steps in between.

    The loop's clock stands still while an evaluator runs. What comes before the first of them warms the loop up.

    Args:
        contender: the bare step.
        options: how many steps and rounds.
        progress: told how far it is.

    Attributes:
        loop: images a second of the loop, one figure a round.
        bare: likewise of the bare step.
        contender: the bare step.
    """

    def __init__(self, contender: Contender, options: BenchTrain, progress: Progress) -> None:
        self.loop: list[float] = []
        self.bare: list[float] = []
        self.contender = contender
        self._run_bare = partial(images_per_second, contender, options.steps)
        self._rounds = options.rounds
        self._progress = progress
        self._warm = False
        self._clock = 0.0  # the loop's, seconds
        self._images = self._seconds = self._waited = 0.0  # of this round, this round, all rounds
        self._total = 0.0  # seconds of all rounds

    @property
    def data_wait(self) -> float:
        """The share of its time that the loop waited for data."""
        return self._waited / self._total

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.log`."""
        del step
        if kind != "train":
            return
        seconds = values["seconds"] - self._clock
        self._clock = values["seconds"]
        if self._warm:
            self._images += values["images_per_s"] * seconds
            self._seconds += seconds
            self._waited += values["data_wait"] * seconds

    def log_picture(self, name: str, step: int, path: Path) -> None:
        """As `Tracker.log_picture`."""

    def close(self) -> None:
        """As `Tracker.close`."""

    def evaluate(self, step: int) -> dict[str, float]:
        """As `Evaluator.run`: ends a round."""
        del step
        if self._warm:
            self.loop.append(self._images / self._seconds)
            self.bare.append(self._run_bare())
            self._total += self._seconds
            self._images = self._seconds = 0.0
            self._progress("timing the loop", len(self.loop), self._rounds)
        self._warm = True
        if len(self.loop) == self._rounds:
            raise _Enough
        return {}
