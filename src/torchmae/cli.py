"""The command line. Nothing heavy is imported before a command needs it, so `torchmae --help` answers at once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from torchmae import settings
from torchmae.errors import ConfigError, TorchmaeError
from torchmae.threads import wait_briefly

USAGE = """\
torchmae: masked autoencoder pre-training in PyTorch

usage: torchmae COMMAND [OPTIONS]

commands:
  pretrain      train a masked autoencoder on images: a folder, or a name such as digits or cifar10
  reconstruct   hide part of some images and let a trained model fill it in
  evaluate      measure what a model learned: nearest neighbours, probes, fine-tuning, anomaly detection
  embed         write the features of many images to a file
  visualize     draw what a model learned: features as colours, attention, neighbours, a map
  app           try a model in the browser: paint a hole, see it filled in, compare two runs
  report        write the page of a run, or of several side by side
  export        write a model for timm, transformers, ONNX and others, and check it
  push          export a model and upload it to the Hugging Face hub
  plan          what a run would cost: memory, speed, GPU hours
  bench         how fast training is here, beside other code, and where its time goes
  data          inspect a data set, or pack it into files that are read fast
  recipes       list the named sets of settings
  completion    print a script that completes commands and options on Tab: for bash, zsh or fish

  torchmae pretrain                                  digits, on the processor, about a minute, no network
  torchmae pretrain --data my_images --out runs/a    any folder of images
  torchmae pretrain --resume runs/a                  go on with a run that was stopped
  torchmae reconstruct runs/a photo.jpg --out grid.png

  torchmae COMMAND --help    the options of a command
  torchmae --version         versions, for bug reports
"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        args: words after `torchmae`; None: the process's own.

    Returns:
        The exit status: 0; 2 for a user's mistake, said in one line; 1 for a run that cannot go on; 128 plus the
        signal's number for one that was stopped.
    """
    words = list(sys.argv[1:] if args is None else args)
    wait_briefly(os.environ)
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(USAGE, end="")
            return 0
        if words[0] == "--version":
            from torchmae.commands.versions import describe

            print(describe())
            return 0
        if words[0] not in COMMANDS:
            near = None if words[0].startswith("-") else settings.nearest(words[0], COMMANDS)
            hint = f"did you mean `torchmae {near}`?" if near else "see torchmae --help"
            raise ConfigError(f"unknown command {words[0]!r}", hint)
        if os.environ.get("LOCAL_WORLD_SIZE", "1") != "1" and words[0] not in DISTRIBUTED:
            if os.environ.get("RANK", "0") != "0":  # it is said once
                return ConfigError.exit_status
            raise ConfigError(f"{words[0]} is for one process, and torchrun has started several", "leave out torchrun")
        return COMMANDS[words[0]](words[1:])
    except TorchmaeError as error:
        print(f"torchmae: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("torchmae: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def pretrain(args: list[str]) -> int:
    """`torchmae pretrain`: trains, then prints a short table and the path of the report."""
    if "-h" in args or "--help" in args:
        settings.build_parser().print_help()
        print(
            "\nalso:\n  --resume RUN          go on with a run that was stopped\n"
            "  --json                print the final figures as one JSON object on the last line"
        )
        return 0
    args = settings.normalise(args)
    as_json = settings.take_flag(args, "json")
    resume = settings.take_option(args, "resume")
    if settings.take_flag(args, "print_config"):
        from torchmae.api import configure

        print(settings.to_yaml(configure(args)), end="")
        return 0
    from torchmae.api import begin
    from torchmae.runs import resume_run

    run = resume_run(Path(resume), args) if resume is not None else begin(args)
    if os.environ.get("RANK", "0") != "0":  # of ranks that torchrun started, the first one speaks
        return 0
    from torchmae.report.table import final_table

    print(final_table(run.figures), flush=True)
    for hint in run.hints:
        print(f"hint: {hint}")
    print(f"report: {run.report}")
    if as_json:
        print(json.dumps(run.figures))
    return 0


def reconstruct(args: list[str]) -> int:
    """`torchmae reconstruct`: masked, reconstructed and original images side by side."""
    from torchmae.commands.reconstruct import main as run

    return run(args)


def evaluate(args: list[str]) -> int:
    """`torchmae evaluate`: figures beside those of an untrained network and of raw pixels."""
    from torchmae.commands.evaluate import main as run

    return run(args)


def embed(args: list[str]) -> int:
    """`torchmae embed`: features of many images, in a file."""
    from torchmae.commands.embed import main as run

    return run(args)


def visualize(args: list[str]) -> int:
    """`torchmae visualize`: pictures of what a model learned."""
    from torchmae.commands.visualize import main as run

    return run(args)


def app(args: list[str]) -> int:
    """`torchmae app`: a page to try a model on."""
    from torchmae.commands.app import main as run

    return run(args)


def report(args: list[str]) -> int:
    """`torchmae report`: the page of a run, or of several side by side."""
    from torchmae.commands.report import main as run

    return run(args)


def plan(args: list[str]) -> int:
    """`torchmae plan`: what a run would cost."""
    from torchmae.commands.plan import main as run

    return run(args)


def bench(args: list[str]) -> int:
    """`torchmae bench`: how fast training is, and where its time goes."""
    from torchmae.commands.bench import main as run

    return run(args)


def export(args: list[str]) -> int:
    """`torchmae export`: a model in another library's format, checked."""
    from torchmae.commands.export import main as run

    return run(args)


def push(args: list[str]) -> int:
    """`torchmae push`: a model on the Hugging Face hub."""
    from torchmae.commands.push import main as run

    return run(args)


def data(args: list[str]) -> int:
    """`torchmae data`: what a data set holds; packing it."""
    from torchmae.commands.data import main as run

    return run(args)


def recipes(args: list[str]) -> int:
    """`torchmae recipes`: names, one line each."""
    if args in (["-h"], ["--help"]):
        print(
            "usage: torchmae recipes\n\nLists the recipes, one a line; use one with `torchmae pretrain --recipe NAME`."
        )
        return 0
    if args:
        raise ConfigError(f"recipes takes no options, given {args[0]!r}", "run `torchmae recipes`")
    names = settings.recipe_names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {settings.recipe_summary(name)}")
    return 0


def completion(args: list[str]) -> int:
    """`torchmae completion`: a script that completes commands, options and their values."""
    from torchmae.commands.completion import main as run

    return run(args, COMMANDS)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "pretrain": pretrain,
    "reconstruct": reconstruct,
    "evaluate": evaluate,
    "embed": embed,
    "visualize": visualize,
    "app": app,
    "report": report,
    "export": export,
    "push": push,
    "plan": plan,
    "bench": bench,
    "data": data,
    "recipes": recipes,
    "completion": completion,
}
# What the processes that torchrun starts do together.
DISTRIBUTED = ("pretrain", "embed", "evaluate")
