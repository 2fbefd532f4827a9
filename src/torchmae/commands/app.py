"""`torchmae app`: a page in the browser to try a trained model."""

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

    with listen(options.host, options.port) as listening:  # before loading models, to report a used port at once
        serve(open_session(options, say=lambda note: print(f"note: {note}")), listening, options)
    raise KeyboardInterrupt  # only a signal ends the page, and uvicorn drops a signal that comes while it starts
