"""`torchmae pretrain`: trains, then prints a short table and the path of the report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchmae import settings
from torchmae.api import begin, configure
from torchmae.commands import print_json
from torchmae.config.pretrain import PretrainOptions
from torchmae.report.table import final_table
from torchmae.runs import resume_run
from torchmae.words import in_words


def run(options: PretrainOptions, given: Mapping[str, Any]) -> int:
    """Runs the command; returns the exit status."""
    if options.print_config:
        print(settings.to_yaml(configure(given)), end="")
        return 0
    result = begin(given) if options.resume is None else resume_run(Path(options.resume), given)
    if os.environ.get("RANK", "0") != "0":  # only rank 0 prints
        return 0
    print(final_table(result.figures), flush=True)
    for hint in result.hints:
        print(f"hint: {in_words(hint, result.figures.get('kind', 'image'))}")
    print(f"report: {result.report}")
    print_json(options.json, result.figures)
    return 0
