"""`torchmae app`: a page in the browser to try a trained model on."""

from __future__ import annotations

from importlib.util import find_spec

from torchmae.config.visualize import AppOptions
from torchmae.errors import ConfigError


def run(options: AppOptions) -> int:
    """Runs the command; returns the exit status."""
    if find_spec("gradio") is None:
        raise ConfigError("the page needs gradio, which is not installed", "pip install 'torchmae[app]'")
    from torchmae.app.server import listen, serve
    from torchmae.app.session import open_session

    with listen(options.host, options.port) as listening:  # before the models: a port that is taken is told at once
        serve(open_session(options, say=lambda note: print(f"note: {note}")), listening, options)
    raise KeyboardInterrupt  # a page ends by a signal alone, and uvicorn loses one that comes as it begins to serve
