"""`torchmae plan`: the cost of a pre-training run."""

from __future__ import annotations

from torchmae.config.plan import PlanOptions
from torchmae.planning.cost import describe, plan


def run(options: PlanOptions) -> int:
    """Runs the command; returns the exit status."""
    print(describe(options, plan(options)))
    return 0
