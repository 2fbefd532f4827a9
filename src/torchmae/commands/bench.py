"""`torchmae bench`: how fast training is here, beside other code, and where its time goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torchmae import settings
from torchmae.bench.options import DataOptions, OutputOptions, StepOptions, TrainOptions
from torchmae.errors import one_of
from torchmae.settings import read_options

if TYPE_CHECKING:
    from torchmae.bench.results import Report
    from torchmae.config import PretrainConfig
    from torchmae.data.formats import Progress

USAGE = """\
usage: torchmae bench step|data|train [OPTIONS]

  torchmae bench step     a training step (mask, forward, backward, optimiser) on a batch that is there already
  torchmae bench data     the loading of images alone
  torchmae bench train    the loop of `torchmae pretrain`, beside the bare step

Each takes the settings of `torchmae pretrain` too (--recipe, --data, --model.preset, --batch_size, --precision, ...)
and runs what they describe. `torchmae bench step --help` lists the rest.
"""
EPILOG = "Besides: every setting of `torchmae pretrain` (see torchmae pretrain --help)."
STEP_PRESET = "vit_tiny_32_p4"
KINDS: dict[str, tuple[type[Any], str]] = {
    "step": (
        StepOptions,
        f"Times one training step on random images. Without --recipe, --config and --model.preset: {STEP_PRESET} with "
        "the default settings.",
    ),
    "data": (DataOptions, "Times the loading of images: reading, decoding, cropping, batches."),
    "train": (TrainOptions, "Times the training loop on real data, beside the bare step."),
}


def main(args: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    kind, *rest = args
    one_of("bench", kind, KINDS)
    options_type, description = KINDS[kind]
    parser = settings.Parser(
        prog=f"torchmae bench {kind}",
        usage=f"torchmae bench {kind} [OPTIONS]",
        description=description,
        epilog=EPILOG,
        allow_abbrev=False,
    )
    own, run = separate(settings.normalise(rest), (options_type, OutputOptions))
    _, options, output = read_options(parser, own, options_type, OutputOptions)

    from torchmae.training.progress import Display

    config = configure(kind, run)
    display = Display(config.progress)
    try:
        report = measure(kind)(config, options, display.preparing)
    finally:
        display.close()
    print(report.text(), flush=True)
    if output.json is not None:
        report.write_json(output.json)
    if output.plot is not None:
        report.write_plot(output.plot)
    return 0


def separate(args: list[str], kinds: Sequence[type[Any]]) -> tuple[list[str], list[str]]:
    """Splits words into those for the fields of `kinds` (and for help), and the run's settings."""
    run = args.copy()
    own = [word for word in run if word in ("-h", "--help")]
    for name in (field.name for kind in kinds for field in fields(kind)):
        value = settings.take_option(run, name)
        if value is not None:
            own.append(f"--{name}={value}")
    return own, run


def configure(kind: str, args: Sequence[str]) -> PretrainConfig:
    """The run's settings. Only a step needs no data, which elsewhere chooses the recipe if nothing else does."""
    if kind == "step":
        recipe, _ = settings.peek(args)
        named = [word for word in args if word.startswith(("--config", "--model.preset"))]
        return settings.parse(args if recipe or named else [f"--model.preset={STEP_PRESET}", *args], recipe)
    from torchmae.api import configure as configure_run

    return configure_run(args)


def measure(kind: str) -> Callable[[PretrainConfig, Any, Progress], Report]:
    """The function that measures, imported only when it is asked for."""
    if kind == "step":
        from torchmae.bench.step import entries, measure_step

        return lambda config, options, progress: measure_step(entries(config, options.against), options, progress)
    if kind == "data":
        from torchmae.bench.data import measure_data

        return measure_data
    from torchmae.bench.train import measure_train

    return measure_train
