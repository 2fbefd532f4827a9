"""The command line. Commands import their own modules, so `torchmae --help` answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from torchmae.commands import COMMANDS, Command, describe
from torchmae.config import PretrainConfig
from torchmae.config.base import make
from torchmae.errors import ConfigError, TorchmaeError, nearest
from torchmae.machine import wait_briefly
from torchmae.settings import read_words

EXAMPLES = """
  torchmae pretrain                                  digits, on the processor, about a minute, no network
  torchmae pretrain --data my_images --out runs/a    any folder of images
  torchmae pretrain --resume runs/a                  go on with a run that was stopped
  torchmae reconstruct runs/a photo.jpg --out grid.png

  torchmae COMMAND --help    the options of a command
  torchmae --version         versions, for bug reports
"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command of the words after `torchmae` (None: `sys.argv`).

    Returns the exit status: 0; 2 for a user's mistake, reported in one line; 1 for a run that cannot continue; 128 plus
    the signal's number for a run that a signal stopped.
    """
    words = list(sys.argv[1:] if args is None else args)
    wait_briefly(os.environ)
    try:
        if words[:1] == ["--version"]:
            from torchmae.commands.versions import describe as versions

            print(versions())
            return 0
        name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0] if words else "help"
        if name not in COMMANDS:
            return _usage(name, words[1:])
        command, words = COMMANDS[name], words[len(name.split()) :]
        if "-h" in words or "--help" in words:
            describe(name).print_help()
            return 0
        if os.environ.get("LOCAL_WORLD_SIZE", "1") != "1" and not command.several:
            if os.environ.get("RANK", "0") != "0":  # rank 0 prints it
                return ConfigError.exit_status
            raise ConfigError(f"{name} is for one process, and torchrun has started several", "leave out torchrun")
        return _run(command, words)
    except TorchmaeError as error:
        print(f"torchmae: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("torchmae: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(command: Command, words: Sequence[str]) -> int:
    """Converts the words to settings and calls the command."""
    given = read_words(words, *command.kinds)
    options = [given if kind is PretrainConfig else make(kind, given) for kind in command.kinds]
    module, function = command.run.split(".")
    return int(getattr(import_module(f"torchmae.commands.{module}"), function)(*options))


def _usage(first: str, rest: Sequence[str]) -> int:
    """Lists all commands, or those that begin with a word such as `data`."""
    own = {name: command for name, command in COMMANDS.items() if name.startswith(f"{first} ")}
    if first in ("-h", "--help", "help") or (own and (not rest or rest[0] in ("-h", "--help"))):
        print("torchmae: masked autoencoder pre-training in PyTorch\n\nusage: torchmae COMMAND [OPTIONS]\n\ncommands:")
        for name, command in (own or COMMANDS).items():
            print(f"  {name:<13} {command.about.splitlines()[0].rstrip('.')}")
        print(EXAMPLES, end="")
        return 0
    wrong = f"{first} {rest[0]}" if own else first
    near = None if first.startswith("-") else nearest(wrong, COMMANDS)
    hint = f"did you mean `torchmae {near}`?" if near else "see torchmae --help"
    raise ConfigError(f"unknown command {wrong!r}", hint)
