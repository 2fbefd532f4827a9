"""`torchmae push`: a model on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchmae import settings
from torchmae.publish.options import ExportOptions
from torchmae.settings import read_options

DESCRIPTION = (
    "Exports a model, checks it, and uploads it with its model card to the Hugging Face hub. The token is HF_TOKEN, or "
    "what `hf auth login` stored. Otherwise only data that is downloaded by name, and --trackers, use the network."
)


@dataclass(frozen=True)
class Options:
    """How it is published.

    Attributes:
        private: make a new repository private.
    """

    private: bool = False


def main(args: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = settings.Parser(
        prog="torchmae push",
        usage="torchmae push RUN USER/NAME [--to FORMAT] [OPTIONS]",
        description=DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=str, help="run folder, fine-tuned classifier's folder, or weights of others")
    parser.add_argument("repo", type=str, metavar="USER/NAME", help="repository on the hub; made if it does not exist")
    values, options, repository = read_options(parser, args, ExportOptions, Options)

    from torchmae.publish.hub import push

    print(push(values.run, values.repo, options, private=repository.private))
    return 0
