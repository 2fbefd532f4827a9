"""The web server of the page: for this computer only, unless --host is given; the page loads nothing from elsewhere."""

from __future__ import annotations

import errno
import os
import socket
import sys
import tempfile
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchmae.app.session import Session
from torchmae.config.visualize import AppOptions
from torchmae.data.items import quiet_pillow
from torchmae.errors import ConfigError

MAX_UPLOAD = 32 * 2**20
"""Largest upload, in bytes."""

FIRST_PORT = 7860
_PORTS_TRIED = 100
# Host names that a page for this computer only accepts, against DNS rebinding.
_LOCAL = ("127.0.0.1", "localhost")


def listen(host: str, port: int | None) -> socket.socket:
    """Opens a listening socket on an address of this computer; `port` None: the first free one from 7860; 0: any.

    ConfigError: the host is not this computer's, or the port is taken or not allowed.
    """
    other = "choose another --port, or leave it out"
    ports = range(FIRST_PORT, FIRST_PORT + _PORTS_TRIED) if port is None else (port,)
    for number in ports:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            return socket.create_server(address[:2], family=family)
        except socket.gaierror as error:
            raise ConfigError(f"host {host!r} is not known: {error.strerror}", "use 127.0.0.1, or 0.0.0.0") from error
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                reason = os.strerror(error.errno or 0)
                raise ConfigError(f"port {number} of {host} cannot be used: {reason}", other) from error
    tried = f"port {port}" if port is not None else f"each of the ports {ports[0]} to {ports[-1]}"
    raise ConfigError(f"{tried} of {host} is in use", other)


def serve(session: Session, listening: socket.socket, options: AppOptions) -> None:
    """Serves the page until Ctrl-C (KeyboardInterrupt) or a signal.

    Uploaded files are kept in a folder that only this user can read, and deleted at the end.
    """

    def announce(address: str) -> None:
        if options.host not in (*_LOCAL, "::1"):
            print(
                f"torchmae: --host {options.host}: whoever can reach this computer can open the page", file=sys.stderr
            )
        print(f"{address}  (Ctrl-C stops it)", flush=True)
        if options.open:
            webbrowser.open(address)

    with tempfile.TemporaryDirectory(prefix="torchmae-app-") as uploads, quiet_pillow():
        build_server(session, listening, Path(uploads), announce, options.lang).run(sockets=[listening])


def build_server(
    session: Session,
    listening: socket.socket,
    uploads: Path,
    ready: Callable[[str], None],
    language: str | None = None,
) -> Any:
    """A uvicorn server of the page; it calls `ready` with its address when it has started."""
    # gradio reads these on import and when components are made.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    import uvicorn
    from fastapi import FastAPI
    from gradio import mount_gradio_app, themes
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from torchmae.app.page import Page

    host, port = listening.getsockname()[:2]
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if host in _LOCAL:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(_LOCAL))
    theme = themes.Soft(  # system fonts: none is downloaded
        primary_hue="blue",
        neutral_hue="slate",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
    mount_gradio_app(
        app,
        Page(session, language).build(),
        path="/",
        server_name=host,
        server_port=port,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css_paths=Path(__file__).with_name("page.css"),
    )
    shown = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready(f"http://{shown}:{port}/")

    # An open page keeps a connection; Ctrl-C must not wait for it.
    return Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
