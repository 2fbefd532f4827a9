"""`torchmae embed`: writes the features of a data set to a file."""

from __future__ import annotations

import os

from torchmae.config.evaluate import ComputeOptions, EmbedOptions
from torchmae.evaluation.embedding import embed_run


def run(options: EmbedOptions, compute: ComputeOptions) -> int:
    """Runs the command; returns the exit status."""
    written = embed_run(options, compute)
    if os.environ.get("RANK", "0") != "0":  # only rank 0 prints
        return 0
    shape = " x ".join(f"{number:,}" for number in (written.count, *written.shape))
    extra = f", {written.left_out} unreadable images left out" if written.left_out else ""
    resumed = f", {written.resumed:,} images embedded by an earlier command" if written.resumed else ""
    print(f"{written.path}  ({shape} features{extra}{resumed})")
    return 0
