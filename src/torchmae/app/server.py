"""Serves the page: to this computer alone unless told otherwise, and with nothing fetched from elsewhere."""

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
from torchmae.data.formats import quiet_pillow
from torchmae.errors import ConfigError

MAX_UPLOAD = 32 * 2**20
"""Bytes of a file beyond which an upload is refused."""

FIRST_PORT = 7860
_PORTS_TRIED = 100
# Names by which a page that only this computer may open is asked for. A site that points a name of its own at this
# computer (DNS rebinding) is turned away.
_LOCAL = ("127.0.0.1", "localhost")


def listen(host: str, port: int | None) -> socket.socket:
    """Takes a port.

    Args:
        host: a name or an address of this computer; 0.0.0.0: all of them.
        port: None: 7860, or the first after it that is free; 0: any.

    Raises:
        ConfigError: the host is not this computer's, or the port is taken or may not be used.
    """
    ports = range(FIRST_PORT, FIRST_PORT + _PORTS_TRIED) if port is None else (port,)
    for number in ports:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            return socket.create_server(address[:2], family=family)
        except socket.gaierror as error:
            raise ConfigError(f"host {host!r} is not known: {error.strerror}", "use 127.0.0.1, or 0.0.0.0") from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE and port is None:
                continue
            taken = error.errno == errno.EADDRINUSE
            reason = "is in use" if taken else f"cannot be used: {os.strerror(error.errno or 0)}"
            raise ConfigError(f"port {number} of {host} {reason}", "choose another --port, or leave it out") from error
    raise ConfigError(f"ports {ports[0]} to {ports[-1]} of {host} are all in use", "choose one with --port")


def serve(
    session: Session,
    listening: socket.socket,
    *,
    run: str,
    language: str | None = None,
    ready: Callable[[str], None],
) -> None:
    """Serves the page until Ctrl-C (KeyboardInterrupt) or a signal ends it.

    What visitors upload lies in a folder that only this user can read, and is gone at the end.

    Args:
        session: what the page shows.
        listening: as `listen` gives it.
        run: the first run as one would type it.
        language: "en" or "zh"; None: the browser's.
        ready: called with the page's address once it answers.
    """
    with tempfile.TemporaryDirectory(prefix="torchmae-app-") as uploads, quiet_pillow():
        server = build_server(session, listening, Path(uploads), run=run, language=language, ready=ready)
        server.run(sockets=[listening])


def build_server(
    session: Session,
    listening: socket.socket,
    uploads: Path,
    *,
    run: str,
    language: str | None,
    ready: Callable[[str], None],
) -> Any:
    """A uvicorn server of the page. Arguments as for `serve`; `uploads`: the folder of what visitors upload."""
    # Read by gradio when it is imported and when components are made.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    import uvicorn
    from fastapi import FastAPI
    from gradio import mount_gradio_app
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from torchmae.app.page import Page, stylesheet, theme

    host, port = listening.getsockname()[:2]
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if host in _LOCAL:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(_LOCAL))
    mount_gradio_app(
        app,
        Page(session, run, language).build(),
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
        theme=theme(),
        css=stylesheet(),
    )
    shown = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready(f"http://{shown}:{port}/")

    # A page that is open elsewhere keeps a connection; Ctrl-C must not wait for it.
    return Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))


def announce(host: str, open_browser: bool) -> Callable[[str], None]:
    """What to do with the page's address once it answers: print it, and open it if asked to."""

    def tell(address: str) -> None:
        if host not in (*_LOCAL, "::1"):
            print(f"torchmae: --host {host}: whoever can reach this computer can open the page", file=sys.stderr)
        print(f"{address}  (Ctrl-C stops it)", flush=True)
        if open_browser:
            webbrowser.open(address)

    return tell
