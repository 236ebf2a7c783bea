"""The process: a socket, uvicorn around the app, and its end by signals."""

import asyncio
import math
import os
import socket
import sys
from collections.abc import Callable

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import RiverError

KEEP_ALIVE_SECONDS = 30  # of a connection without a request whose head is whole
MOST_AHEAD = 64 << 10  # bytes that a client may send of its next requests before it is answered


def bound_socket(host: str, port: int, seconds: float) -> socket.socket:
    """That nobody can reach until the server listens. Port 0 is any free one.

    A connection ends once its client has taken nothing of what was sent for `seconds`: a server that closes
    it would wait for that client, and could not come to its end. Linux alone can do so.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(1000 * seconds))
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
        http=_Connection,
        ws="none",
        lifespan="on",
        log_level="error",  # clients that speak no HTTP are nobody's concern,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    _Server(config, ready).run(sockets=[bound])


class _Connection(H11Protocol):
    """Waits for a request's head as long as for its first byte, which alone uvicorn has a limit for.

    And reads on while a request is answered, though there are others behind it (pipelining): a server that
    does not read does not hear that the client has gone, and the request would keep its slot.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._end_at(self.loop.time() + self.timeout_keep_alive)

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.MUST_CLOSE:
            return  # its last request is there; for what follows, uvicorn would end the answer
        timer = self.timeout_keep_alive_task
        super().data_received(data)
        waits = self.cycle is None or self.cycle.response_complete
        if waits and timer and self.timeout_keep_alive_task is None:
            self._end_at(timer.when())

    def handle_events(self) -> None:
        super().handle_events()
        ahead, _ = self.conn.trailing_data
        if self.conn.their_state is not h11.DONE or not ahead:
            return
        if len(ahead) > MOST_AHEAD:
            self.transport.abort()
        else:
            self.flow.resume_reading()

    def _end_at(self, time: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_at(time, self.timeout_keep_alive_handler)


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
