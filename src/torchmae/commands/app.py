"""`torchmae app`: a page in the browser to try a trained model on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from torchmae import settings
from torchmae.app.strings import LANGUAGES
from torchmae.commands.visualize import DataOptions
from torchmae.errors import ConfigError, one_of, within

DESCRIPTION = (
    "Serves a page, to this computer alone, to try a trained model on: choose an image, paint a hole into it, see what "
    "the model makes of it, what it sees and what is like it to it; or compare two runs."
)


@dataclass(frozen=True)
class Options:
    """What `torchmae app` takes beside the runs.

    Attributes:
        features: a data set embedded by `torchmae embed RUN`, among which neighbours are looked for.
        data: where example images come from.
        lang: en or zh; null: the browser's language.
        host: the address to listen on; 0.0.0.0 opens the page to the network, without a password.
        port: to listen on; null: 7860, or the first after it that is free.
        device: auto, cpu, cuda, cuda:1, mps.
        target: what weights of others were trained to predict, where they do not say: pixels or normalised (patches).
    """

    features: Path | None = None
    data: DataOptions = field(default_factory=DataOptions)
    lang: str | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    device: str = "auto"
    target: str | None = None

    def __post_init__(self) -> None:
        if self.lang is not None:
            one_of("lang", self.lang, LANGUAGES)
        within("port", self.port, 0, 65535)


def main(args: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = settings.Parser(
        prog="torchmae app",
        usage="torchmae app RUN [RUN2] [OPTIONS]",
        description=DESCRIPTION,
        epilog="also: --open opens the page in a browser",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run folders, exported models, or weights of others"
    )
    words = list(args)
    open_browser = settings.take_flag(words, "open")
    values, options = settings.read_options(parser, words, Options)
    if find_spec("gradio") is None:
        raise ConfigError("the page needs gradio, which is not installed", "pip install 'torchmae[app]'")
    from torchmae.app.server import announce, listen, serve
    from torchmae.app.session import open_session

    with listen(options.host, options.port) as listening:  # before the models: a port that is taken is told at once
        session = open_session(
            values.runs,
            features=options.features,
            source=options.data.source,
            root=options.data.root,
            device=options.device,
            target=options.target,
            say=lambda note: print(f"note: {note}"),
        )
        serve(
            session,
            listening,
            run=str(values.runs[0]),
            language=options.lang,
            ready=announce(options.host, open_browser),
        )
    raise KeyboardInterrupt  # a page ends by a signal alone, and uvicorn loses one that comes as it begins to serve
