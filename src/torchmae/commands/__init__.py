"""The commands: what each takes, and the function that runs it. A module is imported when its command is used."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from importlib import import_module
from inspect import getdoc
from pathlib import Path
from typing import Any, NamedTuple

from torchmae.config import PretrainConfig
from torchmae.config.base import (
    POSITIONAL,
    Settings,
    alternatives,
    choices,
    is_group,
    many,
    names_file,
    rules,
    settings_of,
)
from torchmae.files import replace_file
from torchmae.settings import ALIASES, recipe_names


class Command(NamedTuple):
    """A command of `torchmae`.

    Attributes:
        about: what it does, in a line.
        module: of `torchmae.config` and of `torchmae.commands`.
        kinds: classes of that module of `torchmae.config`, or of another one that is named before a dot; the last one's
            docstring describes the command. `run` takes an object of each.
        run: the function, in that module of `torchmae.commands`; it returns the exit status.
        configures: whether the command takes the settings of a run as well; `run` takes them by dotted name.
        several: whether the processes that torchrun starts run it together.
    """

    about: str
    module: str
    kinds: tuple[str, ...]
    run: str = "run"
    configures: bool = False
    several: bool = False

    def settings(self) -> tuple[type[Settings], ...]:
        """The classes of `kinds`."""
        homes = [kind.rpartition(".") for kind in self.kinds]
        return tuple(getattr(import_module(f"torchmae.config.{home or self.module}"), kind) for home, _, kind in homes)


COMMANDS = {
    "pretrain": Command(
        "train a masked autoencoder on images: a folder, or a name such as digits or cifar10",
        *("pretrain", ("PretrainOptions",)),
        configures=True,
        several=True,
    ),
    "reconstruct": Command(
        "mask part of some images and let a trained model fill it in", "reconstruct", ("ReconstructOptions",)
    ),
    "evaluate": Command(
        "measure what a model learned: nearest neighbours, probes, fine-tuning, anomaly detection",
        *("evaluate", ("RunOrBaseline", "ComputeOptions", "EvaluateOptions")),
        several=True,
    ),
    "embed": Command(
        "write the features of many images to a file",
        *("embed", ("evaluate.ComputeOptions", "EmbedOptions")),
        several=True,
    ),
    "visualize": Command(
        "draw what a model learned: features as colours, attention, neighbours, a map",
        *("visualize", ("VisualizeOptions",)),
    ),
    "app": Command(
        "try a model in the browser: paint a hole, see it filled in, compare two runs", "app", ("AppOptions",)
    ),
    "report": Command("write the page of a run, or of several side by side", "report", ("ReportOptions",)),
    "export": Command(
        "write a model for timm, transformers, ONNX and others, and check it",
        *("export", ("ExportOptions", "ExportCommand")),
    ),
    "push": Command(
        "export a model and upload it to the Hugging Face hub", "export", ("ExportOptions", "PushCommand"), "push"
    ),
    "plan": Command("what a run would cost: memory, speed, GPU hours", "plan", ("PlanOptions",)),
    "bench step": Command(
        "time a training step on a batch that is there already",
        *("bench", ("OutputOptions", "StepOptions"), "step"),
        configures=True,
    ),
    "bench data": Command(
        "time the loading of images", "bench", ("OutputOptions", "DataOptions"), "data", configures=True
    ),
    "bench train": Command(
        "time the loop of `torchmae pretrain`", "bench", ("OutputOptions", "TrainOptions"), "train", configures=True
    ),
    "data inspect": Command(
        "count, sizes, channels, formats, broken files, duplicates, classes; a recipe that fits",
        *("data", ("InspectOptions",), "inspect"),
    ),
    "data pack": Command(
        "write images into few large files, once, to train fast", "data", ("PackOptions", "PackCommand"), "pack"
    ),
    "recipes": Command("list the named sets of settings", "recipes", ()),
    "completion": Command(
        "print a script that completes commands and options on Tab: for bash, zsh or fish",
        *("completion", ("CompletionOptions",)),
    ),
}


CONFIGURES = (
    "also: --config FILE, a YAML file of settings of a run; options given beside it win.\n"
    "`torchmae bench` takes every setting of a run that `torchmae pretrain` takes."
)


def describe(name: str) -> argparse.ArgumentParser:
    """The help of a command: its usage, its description, and its options."""
    command = COMMANDS[name]
    kinds = command.settings()
    words = []
    for word, setting in settings_of(*kinds).items():
        if POSITIONAL in rules(setting.kind):
            shown = f"{word.upper()}..." if many(setting.kind) else word.upper()
            words.append(shown if setting.default is MISSING else f"[{shown}]")
    text = (getdoc(kinds[-1]) if kinds else None) or f"{command.about}."
    parser = argparse.ArgumentParser(
        prog=f"torchmae {name}",
        usage=" ".join(["torchmae", name, *words, "[OPTIONS]"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=text.partition("Attributes:\n")[0].strip(),
    )
    add_options(parser, (*kinds, PretrainConfig) if name == "pretrain" else kinds)
    if command.configures:
        parser.epilog = CONFIGURES
    return parser


def add_options(parser: argparse.ArgumentParser, kinds: Sequence[type[Settings]], file: Any = None) -> None:
    """Adds an option for every setting. argparse shows and completes them; `settings.read_words` reads them.

    Args:
        parser: where they go.
        kinds: the classes of settings.
        file: how shtab completes the name of a file.
    """
    known = settings_of(*kinds)
    groups = {
        name: parser.add_argument_group(f"{name}: {(getdoc(hint) or '').splitlines()[0].rstrip('.')}")
        for kind in kinds
        for name, hint in kind.types().items()
        if is_group(hint)
    }
    for name, setting in known.items():
        group, _, leaf = name.rpartition(".")
        positional = POSITIONAL in rules(setting.kind)
        names = [f"--{short}" for short, full in ALIASES.items() if full == name and short not in known]
        words = recipe_names() if name == "recipe" else choices(setting.kind)
        about = setting.about if setting.default is MISSING else f"{setting.about} (default: {_shown(setting.default)})"
        action = groups.get(group, parser).add_argument(
            *([name] if positional else [f"--{name}", *names]),
            choices=words or None,
            metavar=leaf.upper() if not words or name == "recipe" or len(alternatives(setting.kind)) > 1 else None,
            nargs="*" if positional and many(setting.kind) else None,
            help=about.replace("%", "%%"),
        )
        actions = [action]
        if positional:
            actions += [parser.add_argument(short, help=f"in place of {name.upper()}") for short in names]
        if file is not None and names_file(setting.kind):
            for each in actions:
                each.complete = file  # type: ignore[attr-defined]


def _shown(value: Any) -> str:
    """A default as a configuration file has it."""
    return json.dumps(value) if not isinstance(value, (str, Path)) else str(value)


def print_json(to: bool | Path, figures: Mapping[str, Any]) -> None:
    """What --json asks for: the figures as one JSON object, on a line of standard output or in a file."""
    if isinstance(to, Path):
        replace_file(to, (json.dumps(figures, indent=1) + "\n").encode())
    elif to:
        print(json.dumps(figures), flush=True)
