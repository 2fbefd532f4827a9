"""`torchmae report`: a page about one run, or about several runs side by side."""

from __future__ import annotations

from pathlib import Path

from torchmae.config.visualize import ReportOptions
from torchmae.report.comparison import write_comparison
from torchmae.report.html import write_report


def run(options: ReportOptions) -> int:
    """Runs the command; returns the exit status."""
    if len(options.runs) == 1:
        print(write_report(options.runs[0], options.out))
    else:
        print(write_comparison(options.runs, options.out or Path("comparison.html")))
    return 0
