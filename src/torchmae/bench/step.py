"""One training step, over and over: images a second, share of the peak, memory, and where the time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median

from torchmae import presets
from torchmae.bench.contenders import OURS, model_arguments, peer_sizes
from torchmae.bench.processes import Introduction, Process
from torchmae.bench.results import Report, Result
from torchmae.bench.timing import take_turns
from torchmae.config import PretrainConfig
from torchmae.config.bench import BenchStep
from torchmae.data.formats import Progress
from torchmae.nn.flops import count_flops


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


def measure_step(rivals: Sequence[Entry], options: BenchStep, progress: Progress) -> Report:
    """Times training steps on one batch that stays on the device; contenders take turns, each in its own process.

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
    with ExitStack() as stack:
        processes: dict[str, Process] = {}
        told: dict[str, Introduction] = {}
        for entry in rivals:  # one after the other: the first steps are timed too
            processes[entry.name] = stack.enter_context(Process(entry.code, entry.config, options.steps))
            told[entry.name] = processes[entry.name].introduce()
            progress("first steps", len(told), len(rivals))
        speeds, peaks = _time(processes, told, options.rounds, progress)
        shares = {name: process.shares() for name, process in processes.items()}
    results = []
    for entry in rivals:
        name, about = entry.name, told[entry.name]
        flops = count_flops(presets.weightless(about.arguments), entry.config.mask.ratio).training
        figures = {
            "flops_per_image": flops,
            "share_of_peak": median(speeds[name]) * flops / peaks[about.precision],
            "first_step_s": about.first_step_s,
            "peak_memory": about.peak_memory,
        }
        results.append(Result(f"{name}, {about.precision}", tuple(speeds[name]), shares[name], figures))
    ours = told[rivals[0].name]
    return Report(
        title=title(rivals[0].config, ours.shape),
        results=results,
        notes=[_flops_note(results), _peak_note(peaks)],
        environment={**ours.environment, "peak_flops_per_s": peaks},
        settings={entry.name: asdict(entry.config) for entry in rivals},
    )


def title(config: PretrainConfig, shape: Sequence[int]) -> str:
    """What is measured, in a line."""
    size = " x ".join(str(number) for number in shape[1:])
    compiled = ", compiled" if config.compile else ""
    return f"{config.model.preset}, {size}, batch {config.batch_size}, mask {config.mask.ratio:g}{compiled}"


def _time(
    processes: Mapping[str, Process], told: Mapping[str, Introduction], rounds: int, progress: Progress
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Images a second of every contender, one figure a round, and the best matrix product of each precision."""
    turns = {name: process.turn for name, process in processes.items()}
    products = {told[name].precision: process.peak for name, process in processes.items()}
    figures = take_turns({**turns, **products}, rounds, lambda done: progress("timing steps", done, rounds))
    return {name: figures[name] for name in turns}, {name: max(figures[name]) for name in products}


def _flops_note(results: Sequence[Result]) -> str:
    counts = {result.name: f"{(result.figures['flops_per_image'] or 0) / 1e9:.3g}" for result in results}
    same = len(set(counts.values())) == 1
    text = counts[results[0].name] if same else ", ".join(f"{name} {count}" for name, count in counts.items())
    return f"GFLOP an image, forward and backward, by formula: {text}."


def _peak_note(peaks: Mapping[str, float]) -> str:
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {precision}" for precision, rate in peaks.items())
    return f"Peak: the fastest large matrix product of this run, {rates}."
