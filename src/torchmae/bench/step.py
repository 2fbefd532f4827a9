"""One training step, over and over: images a second, share of the peak, memory, and where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import torch

from torchmae.bench.contenders import OURS, Contender, build, model_arguments, peer_sizes
from torchmae.bench.memory import peak_memory
from torchmae.bench.options import StepOptions
from torchmae.bench.results import Report, Result
from torchmae.bench.timing import StepClock, matrix_product_rate, seconds_of, take_turns
from torchmae.config import PretrainConfig
from torchmae.data.reading import Progress
from torchmae.errors import ConfigError
from torchmae.nn.flops import count_flops
from torchmae.training.runtime import environment

_WARM_UP_STEPS = 3
_TURN_S = 1.0


@dataclass(frozen=True)
class Entry:
    """A training step that takes part.

    Attributes:
        name: what to call it.
        code: whose step, as in `contenders.build`.
        config: its settings.
    """

    name: str
    code: str
    config: PretrainConfig


def entries(config: PretrainConfig, against: str | None) -> list[Entry]:
    """torchmae's step and, if wanted, that of a peer with the same sizes."""
    return [Entry(code, code, config) for code in (OURS, against) if code is not None]


def measure_step(rivals: Sequence[Entry], options: StepOptions, progress: Progress) -> Report:
    """Times training steps on one batch that stays on the device; contenders take turns in this process.

    Args:
        rivals: the contenders, ours first, all on one device.
        options: how to measure.
        progress: told how far it is.

    Raises:
        ConfigError: sizes that do not fit together, a peer that cannot do them, or memory that does not suffice.
    """
    for entry in rivals:
        if entry.code != OURS:
            peer_sizes(entry.config, model_arguments(entry.config), entry.code)  # says at once what a peer cannot do
    # Memory first: a process that holds nothing yet leaves more to those that are measured.
    memory = _memory(rivals, progress) if options.memory else {}
    try:
        contenders = {entry.name: build(entry.code, entry.config) for entry in rivals}
        first_steps = {name: warm_up(contender) for name, contender in contenders.items()}
        speeds, peaks = _time(contenders, options, progress)
        shares = {name: step_shares(contender) for name, contender in contenders.items()}
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"batches of {rivals[0].config.batch_size} do not fit into memory", "lower batch_size") from (
            error
        )
    results = []
    for entry in rivals:
        contender = contenders[entry.name]
        precision = contender.runtime.precision
        flops = count_flops(contender.arguments, entry.config.mask.ratio).training
        figures = {
            "flops_per_image": flops,
            "share_of_peak": median(speeds[entry.name]) * flops / peaks[precision],
            "first_step_s": first_steps[entry.name],
        }
        results.append(
            Result(
                f"{entry.name}, {precision}",
                tuple(speeds[entry.name]),
                shares[entry.name],
                figures | ({"peak_memory": memory[entry.name]} if memory else {}),
            )
        )
    ours = contenders[rivals[0].name]
    return Report(
        title=title(rivals[0].config, ours),
        results=results,
        notes=[_flops_note(results), _peak_note(peaks)],
        environment={**environment(ours.runtime), "peak_flops_per_s": peaks},
        settings={entry.name: asdict(entry.config) for entry in rivals},
    )


def title(config: PretrainConfig, contender: Contender) -> str:
    """What is measured, in a line."""
    size = " x ".join(str(number) for number in contender.images.shape[1:])
    compiled = ", compiled" if config.compile else ""
    return f"{config.model.preset}, {size}, batch {config.batch_size}, mask {config.mask.ratio:g}{compiled}"


def warm_up(contender: Contender) -> float:
    """Runs the first steps, which compile and allocate; seconds of the very first."""
    device = contender.runtime.device
    first = seconds_of(contender.run, 1, device)
    seconds_of(contender.run, _WARM_UP_STEPS - 1, device)
    return first


def turn(contender: Contender, steps: int | None) -> Callable[[], float]:
    """A function that takes steps and returns images a second; without `steps`, as many as last about a second."""
    device = contender.runtime.device
    times = steps or max(1, round(_TURN_S / seconds_of(contender.run, 1, device)))
    return lambda: len(contender.images) / seconds_of(contender.run, times, device)


def _memory(rivals: Sequence[Entry], progress: Progress) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for entry in rivals:
        found[entry.name] = peak_memory(entry.code, entry.config)
        progress("measuring memory", len(found), len(rivals))
    return found


def _time(
    contenders: Mapping[str, Contender], options: StepOptions, progress: Progress
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Images a second of every contender, one figure a round, and the best matrix product of each precision."""
    turns = {name: turn(contender, options.steps) for name, contender in contenders.items()}
    runtimes = {contender.runtime.precision: contender.runtime for contender in contenders.values()}
    products = {name: partial(matrix_product_rate, runtime.device, name) for name, runtime in runtimes.items()}
    figures = take_turns(
        {**turns, **products}, options.rounds, lambda done: progress("timing steps", done, options.rounds)
    )
    return {name: figures[name] for name in turns}, {name: max(figures[name]) for name in products}


def step_shares(contender: Contender) -> dict[str, float]:
    """Where the time of a step goes; a few steps of their own, since every part is waited for."""
    clock = StepClock(contender.model, contender.optimizers, contender.runtime.device)
    for _ in range(_WARM_UP_STEPS):
        clock.run(contender.step)
    return clock.shares()


def _flops_note(results: Sequence[Result]) -> str:
    counts = {result.name: f"{(result.figures['flops_per_image'] or 0) / 1e9:.3g}" for result in results}
    same = len(set(counts.values())) == 1
    text = counts[results[0].name] if same else ", ".join(f"{name} {count}" for name, count in counts.items())
    return f"GFLOP an image, forward and backward, by formula: {text}."


def _peak_note(peaks: Mapping[str, float]) -> str:
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {precision}" for precision, rate in peaks.items())
    return f"Peak: the fastest large matrix product of this run, {rates}."
