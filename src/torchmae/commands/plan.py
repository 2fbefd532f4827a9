"""`torchmae plan`: what a pre-training run will cost."""

from __future__ import annotations

from collections.abc import Sequence

from torchmae import settings
from torchmae.planning.options import PlanOptions
from torchmae.settings import read_options

DESCRIPTION = (
    "Predicts operations, memory, traffic, speed and GPU hours of a pre-training run from its sizes; nothing is run."
)


def main(args: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = settings.Parser(
        prog="torchmae plan", usage="torchmae plan [OPTIONS]", description=DESCRIPTION, allow_abbrev=False
    )
    _, options = read_options(parser, args, PlanOptions)
    from torchmae.planning.cost import describe, plan

    print(describe(options, plan(options)))
    return 0
