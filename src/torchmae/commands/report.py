"""`torchmae report`: the page of a run, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchmae import settings
from torchmae.errors import ConfigError

DESCRIPTION = "Writes one self-contained HTML page of a run, or of several runs side by side."
COMPARISON = Path("comparison.html")


@dataclass(frozen=True)
class Options:
    """What `torchmae report` takes beside the runs.

    Attributes:
        out: the page to write; null: RUN/report.html, or comparison.html for several runs.
    """

    out: Path | None = None

    def __post_init__(self) -> None:
        if self.out is not None and self.out.suffix.lower() not in (".html", ".htm"):
            raise ConfigError(f"out is {str(self.out)!r}", "the report is a page: give a name that ends in .html")


def main(args: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = settings.Parser(
        prog="torchmae report",
        usage="torchmae report RUN [RUN...] [--out PAGE.html]",
        description=DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders of `torchmae pretrain`")
    values, options = settings.read_options(parser, args, Options)
    if len(values.runs) == 1:
        from torchmae.report.html import write_report

        print(write_report(values.runs[0], options.out))
    else:
        from torchmae.report.comparison import write_comparison

        print(write_comparison(values.runs, options.out or COMPARISON))
    return 0
