"""`torchmae embed`: features of many images, in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torchmae import settings
from torchmae.evaluation.options import ComputeOptions, EmbedOptions

DESCRIPTION = (
    "Writes the features of all images of a data set to a file; nothing is masked. A command that was stopped goes on "
    "where it was when it is given again; torchrun starts it on several GPUs."
)


def main(args: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = settings.Parser(
        prog="torchmae embed",
        usage="torchmae embed RUN [OPTIONS]",
        description=DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=str, help="run folder, exported model, or weights of others (also as --init-from)")
    values, options, compute = settings.read_options(parser, args, EmbedOptions, ComputeOptions)
    line = write(values.run, options, compute)
    if line is not None:
        print(line)
    return 0


def write(run: str, options: EmbedOptions, compute: ComputeOptions) -> str | None:
    """Writes the file.

    Args:
        run: a run folder, an exported model, or weights of others.
        options: which images, which features, where to.
        compute: where to compute.

    Returns:
        What was written, in a line; None on all ranks but the first.
    """
    from torchmae.data.loader import one_line_when_a_worker_ends
    from torchmae.evaluation.embedding import embed
    from torchmae.evaluation.images import ImageSet, ModelInput, open_parts
    from torchmae.evaluation.subject import Subject
    from torchmae.evaluation.suite import own_data
    from torchmae.training.pretrained import load
    from torchmae.training.progress import Display
    from torchmae.training.ranks import one_line_when_lost, open_ranks, share_of_cores
    from torchmae.training.runtime import open_runtime

    with open_ranks(compute.device) as ranks, one_line_when_lost(ranks, "the same command goes on from what was done"):
        runtime = open_runtime(compute.device, compute.precision, compute.threads, ranks)
        display = Display(compute.progress if ranks.is_main else "none")

        def open_all() -> tuple[Subject, list[ImageSet]]:
            pretrained = load(run)
            description = pretrained.description
            data = own_data(run, options.data)
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
