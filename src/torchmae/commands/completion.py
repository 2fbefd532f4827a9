"""`torchmae completion`: a script with which a shell completes commands, options and their values.

The script is static: completing starts no Python. It is made by shtab of the parsers that the commands themselves
build, and values that an option takes are what the check of that option says when it is given a wrong one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, cast

from jsonargparse import capture_parser

from torchmae import settings
from torchmae.errors import ChoiceError, ConfigError, one_of

SHELLS = ("bash", "zsh", "fish")
USAGE = """\
usage: torchmae completion bash|zsh|fish

Prints a script that completes commands, options, recipes and other values on Tab. Write it once, and again after an
update (shtab makes it: pip install 'torchmae[completion]'):

  torchmae completion bash > ~/.local/share/bash-completion/completions/torchmae
  torchmae completion zsh  > ~/.zfunc/_torchmae       (with `fpath+=~/.zfunc` before compinit in ~/.zshrc)
  torchmae completion fish > ~/.config/fish/completions/torchmae.fish
"""
# Commands that take a word before their options.
SUBCOMMANDS = {"bench": ("step", "data", "train"), "data": ("inspect", "pack")}
# What commands take besides the options of their parsers: whether a value follows.
EXTRAS: dict[str, dict[str, bool]] = {
    "pretrain": {"resume": True, "json": False, "print_config": False},
    "evaluate": {"init": True, "init_from": True, "json": False},
    **{name: {"init_from": True} for name in ("reconstruct", "embed", "visualize", "export", "push")},
}
DEVICES = ("auto", "cpu", "cuda", "mps")
# Options, by their last part, whose values are files or folders, besides those of type Path.
PLACES = frozenset({"config", "source", "val", "root", "init_from", "out", "resume", "normal", "test", "sheet"})
WRONG = "?"  # a word that no option takes

Command = Callable[[list[str]], int]


def main(args: Sequence[str], commands: Mapping[str, Command]) -> int:
    """Runs the command.

    Args:
        args: words after `torchmae completion`.
        commands: every command by its name.

    Returns:
        the exit status.

    Raises:
        ConfigError: an unknown shell, or shtab is not installed.
    """
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    one_of("the shell", args[0], SHELLS)
    if args[1:]:
        raise ConfigError(f"unexpected word {args[1]!r}", "give one shell")
    try:
        import shtab
    except ImportError as error:
        raise ConfigError("completion needs shtab", "pip install 'torchmae[completion]'") from error
    print(shtab.complete(command_tree(commands), args[0]))
    return 0


def command_tree(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """All commands as one parser, for shtab to read; it parses nothing."""
    import shtab

    tree = argparse.ArgumentParser(prog="torchmae")
    tree.add_argument("--version", action="store_true", help="versions, for bug reports")
    branches = tree.add_subparsers(dest="command")
    for name, command in commands.items():
        branch = branches.add_parser(name, help=_first_line(command))
        for option, has_value in EXTRAS.get(name, {}).items():
            if has_value:
                _complete(branch.add_argument(f"--{option}"), shtab.FILE)
            else:
                branch.add_argument(f"--{option}", action="store_true")
        if name in SUBCOMMANDS:
            parts = branch.add_subparsers(dest="part")
            for part in SUBCOMMANDS[name]:
                leaf = parts.add_parser(part, help=part)
                _add_options(leaf, _parser_of(command, [part]))
                if name == "bench":  # which hands the rest to `torchmae pretrain`
                    _add_options(leaf, settings.build_parser())
        elif name == "completion":
            branch.add_argument("shell", choices=SHELLS)
        elif name != "recipes":
            _add_options(branch, _parser_of(command, []))
    return tree


def choices(kind: type[Any], prefix: str = "") -> dict[str, tuple[str, ...]]:
    """The values of those fields of a dataclass that take one of a few words, by dotted name."""
    found: dict[str, tuple[str, ...]] = {}
    for item in fields(kind):
        name = f"{prefix}{item.name}"
        if is_dataclass(item.default_factory):
            found |= choices(cast(type[Any], item.default_factory), f"{name}.")
        elif str(item.type).startswith("bool"):
            found[name] = ("true", "false")
        elif "str" in str(item.type):
            words = _by_check(kind, item.name) or _checked_later(item.name)
            found |= {name: words} if words else {}
    return found


def _by_check(kind: type[Any], name: str) -> tuple[str, ...]:
    """What the check of a dataclass says that a field takes, when it is given a wrong word; none if it takes that."""
    try:
        kind(**{name: WRONG})
    except ChoiceError as error:
        return error.choices
    except ConfigError:
        pass
    return ()


def _checked_later(name: str) -> tuple[str, ...]:
    """What settings take that are not checked before they are used."""
    if name == "device":
        return DEVICES
    if name == "recipe":
        return tuple(settings.recipe_names())
    if name == "preset":
        from torchmae.presets import PRESETS

        return tuple(PRESETS)
    if name == "method":
        from torchmae.evaluation.methods import METHODS

        return ("all", *METHODS)
    return ()


def _parser_of(command: Command, words: list[str]) -> settings.Parser:
    """The parser that a command builds; it runs no further."""
    return cast(settings.Parser, capture_parser(command, words))


def _add_options(branch: argparse.ArgumentParser, parser: settings.Parser) -> None:
    """Adds what `parser` takes to `branch`, but for what is there already."""
    import shtab

    values = {name: words for kind in parser.kinds for name, words in choices(kind).items()}
    there = {option for action in branch._actions for option in action.option_strings}
    aliases = {name: alias for alias, name in settings.ALIASES.items()}
    groups = {name.rpartition(".")[0] for name in parser.option_names()}
    for action in parser._actions:
        if not action.option_strings:
            _complete(branch.add_argument(action.dest, nargs=cast(Any, action.nargs)), shtab.FILE)
            continue
        name = action.option_strings[-1].removeprefix("--")
        if name in groups or f"--{name}" in there or action.help == argparse.SUPPRESS:
            continue
        short = [f"--{aliases[name]}"] if name in aliases else []
        added = branch.add_argument(f"--{name}", *short, choices=values.get(name), help=_summary(action.help))
        if name not in values and (name.rpartition(".")[2] in PLACES or "Path" in str(action.type)):
            _complete(added, shtab.FILE)


def _complete(action: argparse.Action, pattern: Any) -> None:
    action.complete = pattern  # type: ignore[attr-defined]  # shtab's way to say what a value is


def _first_line(command: Command) -> str:
    return (command.__doc__ or "").partition("\n")[0].partition(": ")[2].rstrip(".")


def _summary(text: str | None) -> str:
    """The first clause of an option's help, without what argparse would fill in."""
    return (text or "").split(":")[0].split(";")[0].split(" (")[0].split(", ")[0].replace("%", "%%").rstrip(".")
