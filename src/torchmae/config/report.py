"""The settings of `torchmae report`. Light: nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from torchmae.config.base import POSITIONAL, Settings


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Settings):
    """Writes one self-contained HTML page of a run, or of several runs side by side.

    Attributes:
        runs: run folders of `torchmae pretrain`.
        out: the page to write; null: RUN/report.html, or comparison.html for several runs.
    """

    runs: Annotated[tuple[Path, ...], POSITIONAL]
    out: Annotated[Path, ".html", ".htm"] | None = None
