"""`torchmae export`: a model in another library's format, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchmae import settings
from torchmae.errors import ConfigError
from torchmae.publish.options import ExportOptions
from torchmae.settings import read_options

DESCRIPTION = (
    "Writes a model as a folder that another library loads, with a model card (README.md), reads it back with that "
    "library and compares what both compute. The folder is there whole and compared, or not at all."
)


@dataclass(frozen=True)
class Options:
    """Where it goes.

    Attributes:
        out: the folder to make.
    """

    out: str | None = None


def main(args: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = settings.Parser(
        prog="torchmae export",
        usage="torchmae export RUN --to FORMAT --out DIR [OPTIONS]",
        description=DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=str, help="run folder, fine-tuned classifier's folder, or weights of others")
    values, options, where = read_options(parser, args, ExportOptions, Options)
    if where.out is None:
        raise ConfigError("out is not given", "add --out DIR, the folder to make")

    from torchmae.publish.export import export

    made = export(values.run, Path(where.out), options)
    for note in made.notes:
        print(f"note: {note}")
    print(f"check: {made.check}")
    print(f"{made.path}  ({', '.join(made.files)})")
    return 0
