"""The table of commands with their settings and functions. A command's module is imported when it runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from inspect import getdoc
from pathlib import Path
from typing import Any, NamedTuple

from torchmae.config import PretrainConfig
from torchmae.config.base import Settings, alternatives, is_group, settings_of
from torchmae.config.bench import BenchData, BenchStep, BenchTrain, OutputOptions
from torchmae.config.completion import CompletionOptions
from torchmae.config.data import InspectOptions, PackCommand, PackOptions
from torchmae.config.evaluate import ComputeOptions, EmbedOptions, EvaluateOptions, RunOrBaseline
from torchmae.config.export import ExportCommand, ExportOptions, PushCommand
from torchmae.config.plan import PlanOptions
from torchmae.config.pretrain import PretrainOptions, RecipesOptions
from torchmae.config.visualize import AppOptions, ReconstructOptions, ReportOptions, VisualizeOptions
from torchmae.files import replace_file
from torchmae.settings import ALIASES, recipe_names


class Command(NamedTuple):
    """A command of `torchmae`.

    Its function takes an object of each class in `kinds`; for `PretrainConfig` it takes the given values by dotted
    name, since a recipe may add others. The docstring of the first class describes the command.
    """

    run: str  # module in `torchmae.commands` and function, which returns the exit status
    kinds: tuple[type[Settings], ...]
    several: bool = False  # whether all ranks of torchrun run it together

    @property
    def about(self) -> str:
        """The description of the command."""
        return (getdoc(self.kinds[0]) or "").partition("Attributes:\n")[0].strip()


COMMANDS = {
    "pretrain": Command("pretrain.run", (PretrainOptions, PretrainConfig), several=True),
    "reconstruct": Command("reconstruct.run", (ReconstructOptions,)),
    "evaluate": Command("evaluate.run", (EvaluateOptions, ComputeOptions, RunOrBaseline), several=True),
    "embed": Command("embed.run", (EmbedOptions, ComputeOptions), several=True),
    "visualize": Command("visualize.run", (VisualizeOptions,)),
    "app": Command("app.run", (AppOptions,)),
    "report": Command("report.run", (ReportOptions,)),
    "export": Command("export.run", (ExportCommand, ExportOptions)),
    "push": Command("export.push", (PushCommand, ExportOptions)),
    "plan": Command("plan.run", (PlanOptions,)),
    "bench step": Command("bench.step", (BenchStep, OutputOptions, PretrainConfig)),
    "bench data": Command("bench.data", (BenchData, OutputOptions, PretrainConfig)),
    "bench train": Command("bench.train", (BenchTrain, OutputOptions, PretrainConfig)),
    "data inspect": Command("data.inspect", (InspectOptions,)),
    "data pack": Command("data.pack", (PackCommand, PackOptions)),
    "recipes": Command("recipes.run", (RecipesOptions,)),
    "completion": Command("completion.run", (CompletionOptions,)),
}
CONFIGURES = (
    "also: --config FILE, a YAML file of settings of a run, which options override.\n"
    "`torchmae bench` takes every setting of a run, as `torchmae pretrain` does."
)


def describe(name: str) -> argparse.ArgumentParser:
    """A parser that prints the help of a command: usage, description and options."""
    command = COMMANDS[name]
    words = []
    kinds = [kind for kind in command.kinds if kind is not PretrainConfig or name == "pretrain"]
    for word, setting in settings_of(*kinds).items():
        if setting.positional:
            shown = f"{word.upper()}..." if setting.several else word.upper()
            words.append(shown if setting.default is MISSING else f"[{shown}]")
    parser = argparse.ArgumentParser(
        prog=f"torchmae {name}",
        usage=" ".join(["torchmae", name, *words, "[OPTIONS]"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=command.about,
        epilog=CONFIGURES if PretrainConfig in command.kinds else None,
    )
    add_options(parser, kinds)
    return parser


def add_options(parser: argparse.ArgumentParser, kinds: Sequence[type[Settings]], file: Any = None) -> None:
    """Adds an option for every setting, for help and completion; `settings.read_words` reads the command line.

    `file` is shtab's completion of file names.
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
        names = [f"--{short}" for short, full in ALIASES.items() if full == name and short not in known]
        words = recipe_names() if name == "recipe" else setting.choices
        about = setting.about if setting.default is MISSING else f"{setting.about} (default: {_shown(setting.default)})"
        action = groups.get(group, parser).add_argument(
            *([name] if setting.positional else [f"--{name}", *names]),
            choices=words or None,
            metavar=leaf.upper() if not words or name == "recipe" or len(alternatives(setting.kind)) > 1 else None,
            nargs="*" if setting.positional and setting.several else None,
            help=about.replace("%", "%%"),
        )
        actions = [action]
        if setting.positional:
            actions += [parser.add_argument(short, help=f"in place of {name.upper()}") for short in names]
        if file is not None and setting.names_file:
            for each in actions:
                each.complete = file  # type: ignore[attr-defined]


def _shown(value: Any) -> str:
    """A default as in a configuration file."""
    return json.dumps(value) if not isinstance(value, (str, Path)) else str(value)


def print_json(to: bool | Path, figures: Mapping[str, Any]) -> None:
    """Writes figures for --json as one JSON object: to a file, or on one line of standard output; nothing if False."""
    if isinstance(to, Path):
        replace_file(to, (json.dumps(figures, indent=1) + "\n").encode())
    elif to:
        print(json.dumps(figures), flush=True)
