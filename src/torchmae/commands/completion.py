"""`torchmae completion`: a shell script that completes commands, options and their values without starting Python."""

from __future__ import annotations

import argparse
from typing import Any

from torchmae.commands import COMMANDS, add_options
from torchmae.config import PretrainConfig
from torchmae.config.completion import CompletionOptions
from torchmae.errors import require


def run(options: CompletionOptions) -> int:
    """Prints the script; returns the exit status."""
    shtab = require("shtab", "completion")
    print(shtab.complete(command_tree(shtab.FILE), options.shell))
    return 0


def command_tree(file: Any) -> argparse.ArgumentParser:
    """All commands as one parser for shtab; `file` is its completion of file names."""
    tree = argparse.ArgumentParser(prog="torchmae")
    tree.add_argument("--version", action="store_true", help="versions, for bug reports")
    branches = {"": tree.add_subparsers()}
    for name, command in COMMANDS.items():
        first, _, second = name.rpartition(" ")
        if first and first not in branches:
            branches[first] = branches[""].add_parser(first, help=first).add_subparsers()
        parser = branches[first].add_parser(second, help=command.about.splitlines()[0])
        add_options(parser, command.kinds, file)
        if PretrainConfig in command.kinds:
            parser.add_argument("--config").complete = file  # type: ignore[attr-defined]
    return tree
