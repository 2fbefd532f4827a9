"""`torchmae bench`: the speed of training on this machine, beside other code, and where its time goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from torchmae.api import configure
from torchmae.bench.contenders import OURS
from torchmae.bench.measure import measure_data, measure_step, measure_train
from torchmae.bench.results import Report
from torchmae.commands import print_json
from torchmae.config import PretrainConfig
from torchmae.config.bench import BenchData, BenchStep, BenchTrain, OutputOptions
from torchmae.data.items import Progress
from torchmae.settings import from_recipe
from torchmae.training.progress import Display

STEP_PRESET = "vit_tiny_32_p4"


def step(options: BenchStep, output: OutputOptions, given: Mapping[str, Any]) -> int:
    """Times a training step."""
    config = step_config(given)
    configs = {code: config for code in (OURS, options.against) if code is not None}
    return _report(config, output, lambda progress: measure_step(configs, options, progress))


def data(options: BenchData, output: OutputOptions, given: Mapping[str, Any]) -> int:
    """Times the loading of images."""
    config = configure(given)
    return _report(config, output, lambda progress: measure_data(config, options, progress))


def train(options: BenchTrain, output: OutputOptions, given: Mapping[str, Any]) -> int:
    """Times the training loop."""
    config = configure(given)
    return _report(config, output, lambda progress: measure_train(config, options, progress))


def step_config(given: Mapping[str, Any]) -> PretrainConfig:
    """The settings of a step. It needs no data to choose a recipe by: the default is STEP_PRESET."""
    named = given.get("recipe", "auto") != "auto" or "model.preset" in given
    return from_recipe(given if named else {**given, "model.preset": STEP_PRESET})


def _report(config: PretrainConfig, output: OutputOptions, measure: Callable[[Progress], Report]) -> int:
    with closing(Display(config.progress)) as display:
        report = measure(display.preparing)
    print(report.text(), flush=True)
    print_json(output.json, report.record())
    if output.plot is not None:
        report.write_plot(output.plot)
    return 0
