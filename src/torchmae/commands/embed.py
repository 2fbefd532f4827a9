"""`torchmae embed`: features of many images, in a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torchmae.config.embed import EmbedOptions
from torchmae.config.evaluate import ComputeOptions
from torchmae.data.loader import one_line_when_a_worker_ends
from torchmae.evaluation.embedding import embed
from torchmae.evaluation.images import ImageSet, ModelInput, open_parts, own_data
from torchmae.evaluation.subject import Subject
from torchmae.training.pretrained import load
from torchmae.training.progress import Display
from torchmae.training.ranks import one_line_when_lost, open_ranks, share_of_cores
from torchmae.training.runtime import open_runtime


def run(options: EmbedOptions, compute: ComputeOptions) -> int:
    """Runs the command; returns the exit status."""
    line = write(options, compute)
    if line is not None:
        print(line)
    return 0


def write(options: EmbedOptions, compute: ComputeOptions) -> str | None:
    """Writes the file.

    Args:
        options: which model, which images, which features, where to.
        compute: where to compute.

    Returns:
        What was written, in a line; None on all ranks but the first.
    """
    with open_ranks(compute.device) as ranks, one_line_when_lost(ranks, "the same command goes on from what was done"):
        runtime = open_runtime(compute.device, compute.precision, compute.threads, ranks)
        display = Display(compute.progress if ranks.is_main else "none")

        def open_all() -> tuple[Subject, list[ImageSet]]:
            pretrained = load(options.run)
            description = pretrained.description
            data = own_data(options.run, options.data)
            model = ModelInput(
                description.input_size,
                description.arguments["in_chans"],
                description.normalisation,
                runtime.device,
                compute.batch_size,
                display.preparing,
            )
            data = replace(data, num_workers=share_of_cores(data.num_workers, ranks))
            parts, notes = open_parts(data, options.split, model)
            for note in (*pretrained.notes, *notes):
                display.say(note)
            return Subject("model", pretrained.model.to(runtime.device)), parts

        try:
            subject, parts = ranks.main_first(open_all)
            out = Path(options.out)
            with one_line_when_a_worker_ends():
                written = embed(subject, parts, out, pool=options.pool, runtime=runtime, progress=display.preparing)
        finally:
            display.close()
    if not ranks.is_main:
        return None
    shape = " x ".join(f"{number:,}" for number in (written.count, *written.shape))
    extra = f", {written.left_out} unreadable images left out" if written.left_out else ""
    resumed = f", {written.resumed:,} images were done already" if written.resumed else ""
    return f"{written.path}  ({shape} features{extra}{resumed})"
