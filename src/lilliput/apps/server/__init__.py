"""An OpenAI-compatible HTTP server over one engine: one generation at a time, a bounded line, nothing else.

Needs lilliput[serve] (starlette and uvicorn), no torch. There is no management API and nothing that changes state.
"""

import logging
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from lilliput.apps.server.app import Generator, create_app
from lilliput.apps.server.guard import Limits, is_loopback
from lilliput.core.errors import OutOfResource
from lilliput.engine.schedules.base import Schedule

__all__ = ["Limits", "create_app", "model_name", "serve"]

log = logging.getLogger("lilliput.server")


def model_name(artifact: str | Path) -> str:
    """The name an artifact is served under: its folder's, without the suffix."""
    return Path(artifact).resolve().name.removesuffix(".lilliput")


def serve(
    engine: Generator,
    artifact: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    bits: int | None = None,
    schedule: Schedule | None = None,
    api_key: str | None = None,
    limits: Limits | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until interrupted. `ready` is called with the URL once the port is ours.

    Raises OutOfResource when the address cannot be had.
    """
    if not is_loopback(host) and api_key is None:
        log.warning(
            "LISTENING ON %s WITHOUT --api-key: everyone who can reach this machine can use this server. "
            "Set LILLIPUT_SERVE_API_KEY, or listen on 127.0.0.1.",
            host,
        )
    app = create_app(
        engine, name=model_name(artifact), host=host, bits=bits, schedule=schedule, api_key=api_key, limits=limits
    )
    listener = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    ready(f"http://{shown}:{listener.getsockname()[1]}")
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=32 << 10,
        limit_concurrency=256,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=5,
    )
    with listener:
        uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Bound here and not by uvicorn, which ends the process when it cannot."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        fix = "Choose another --port (0 picks a free one) or --host"
        raise OutOfResource(f"cannot listen ({error.strerror or error})", f"{host}:{port}", fix) from error
