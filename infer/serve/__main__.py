"""Serves a page that answers pasted notes, and the same as a JSON API: `make serve`.

    python -m infer.serve [--weights DIR --adapter DIR] [--port 8017]

The default model is the released adapter. By default only this machine can connect; with `--host ADDRESS` others can,
and every request needs the token that is printed. Notes are held in memory while they are answered, and not stored.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer import released
from model.support.cli import UserError, run


@dataclass(frozen=True)
class Options:
    """Serve a page and a JSON API that answer notes."""

    weights: Path | None = None
    """A model's folder or GGUF file (default: the released adapter's base)."""
    adapter: Path | None = None
    """A LoRA adapter (PEFT folder) for these weights (default: the released one, if no weights are given)."""
    host: str = "127.0.0.1"
    """Address to listen on, as clients write it. Except for loopback addresses, requests need a token."""
    port: int = 8017
    """The port; 0: any free one."""
    waiting: int = 8
    """Maximum number of requests, of which one is answered at a time; further ones get status 503."""
    seconds: int = 120
    """Maximum time to answer a request, without its time in the queue."""


def main(options: Options) -> int:
    token = None if is_loopback(options.host) else secrets.token_urlsafe(24)
    if options.waiting < 1 or options.seconds < 1:
        raise UserError("--waiting and --seconds must be at least 1")
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise UserError('infer.serve needs FastAPI and uvicorn: pip install -c constraints.txt -e ".[serve]"')
    from infer.serve.app import Models, make_app

    weights = options.weights or released.smollm2()
    adapter = options.adapter if options.adapter or options.weights else released.adapter()
    listening = listen(options.host, options.port)
    models = Models(weights, adapter)
    models.extractor(adapter is not None)  # load now, to report errors before serving
    port = listening.getsockname()[1]
    app = make_app(models, options.host, port, token, options.waiting, options.seconds)
    shown = f"[{options.host}]" if ":" in options.host else options.host
    print(f"http://{shown}:{port}/{'#' + token if token else ''}  (Ctrl-C stops it)", flush=True)
    server_of(app).run(sockets=[listening])
    return 0


def server_of(app: Any, idle: int = 5, connections: int = 512) -> Any:
    """A uvicorn server that closes a connection after `idle` seconds without a request, and answers with a bare 503
    while `connections` are open."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Http(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(idle, self.close_without_request)

        def close_without_request(self) -> None:
            if self.cycle is None:  # no request's headers have arrived
                self.transport.close()

    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Http,
            ws="none",
            lifespan="off",
            timeout_keep_alive=idle,
            limit_concurrency=connections,
            log_level="warning",
            access_log=False,
            server_header=False,
        )
    )


def is_loopback(host: str) -> bool:
    """True for localhost and loopback addresses. Raises UserError for 0.0.0.0 and ::, which clients cannot use."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if address.is_unspecified:
        raise UserError(f"--host {host} is not an address that clients can use; give the one that they connect to")
    return address.is_loopback


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError if it cannot be opened."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no such port"
        raise UserError(f"--host {host} --port {port}: cannot listen there ({reason}); choose another") from error


if __name__ == "__main__":
    run(main, Options)
