"""The process: a socket, uvicorn around the app, and its end by signals."""

import os
import socket
import sys
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from ..errors import RiverError

KEEP_ALIVE_SECONDS = 30  # of a connection on which nothing is asked


def bound_socket(host: str, port: int) -> socket.socket:
    """That nobody can reach until the server listens. Port 0 is any free one."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise RiverError(f"--host {host} --port {port}: cannot be bound ({why})") from None
    return bound


def url_of(bound: socket.socket) -> str:
    host, port, *_ = bound.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: FastAPI, bound: socket.socket, ready: Callable[[], None]) -> None:
    """Serves until SIGTERM or SIGINT, and then until the requests that are there have ended.

    A second signal ends the process at once, with code 130. `ready` is called when clients can connect.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_level="error",  # clients that speak no HTTP are nobody's concern,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    _Server(config, ready).run(sockets=[bound])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame) -> None:
        if self.should_exit:
            print("\nriver: interrupted", file=sys.stderr, flush=True)
            os._exit(130)
        self.should_exit = True
