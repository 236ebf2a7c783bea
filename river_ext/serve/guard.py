"""What a request has to pass before the app sees it: its host, its key, the size and time of its body."""

import hmac
import os
import re
from collections.abc import Iterable

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import RiverError
from .answer import error_response, outcome_of
from .errors import ApiError
from .metrics import Metrics

KEY = "RIVER_API_KEY"  # an environment variable: a command line can be read by all users of a machine
MAX_BODY = 8 << 20  # bytes
BODY_SECONDS = 30  # for all of it
OPEN = ("/", "/health")  # without a key: the page asks for one, and probes have none
PORT = re.compile(r":\d*$")
LOOPBACK = ("127.0.0.1", "[::1]", "localhost")


def environment_key() -> str | None:
    """The key that requests must have; None where there is none."""
    key = os.environ.get(KEY)
    if key is not None and (not key.isascii() or not key.isprintable() or key != key.strip() or not key):
        raise RiverError(f"{KEY} is no key; accepted: printable ASCII characters without blanks around them")
    return key


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics, key: str | None, hosts: Iterable[str] | None):
        """hosts: names that the header Host may have; None allows all."""
        self.app, self.metrics = app, metrics
        self.key = None if key is None else key.encode()
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            self._check_host(scope)
            self._check_key(scope)
            body = await _whole_body(scope, receive)
        except ApiError as error:
            self.metrics.ended(outcome_of(error))
            # the rest of the body is not read, so the connection cannot go on
            error.headers["connection"] = "close"
            return await error_response(error)(scope, receive, send)
        if body is not None:
            await self.app(scope, _again(body, receive), send)

    def _check_host(self, scope: Scope) -> None:
        """Else a page of any site could have its own name lead a browser to this server."""
        given = b",".join(_headers(scope, b"host")).decode("latin-1")
        if self.hosts is not None and PORT.sub("", given).lower() not in self.hosts:
            raise ApiError(403, f"Host: {given[:80]}; accepted: {', '.join(self.hosts)}", code="host")

    def _check_key(self, scope: Scope) -> None:
        if self.key is None or scope["path"] in OPEN:
            return
        given = _headers(scope, b"authorization")
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        # in a time that does not tell how much of it is right
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.key):
            raise ApiError(
                401,
                "no valid API key; accepted: the header Authorization: Bearer KEY, once",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _headers(scope: Scope, name: bytes) -> list[bytes]:
    return [value for header, value in scope["headers"] if header == name]


async def _whole_body(scope: Scope, receive: Receive) -> bytes | None:
    """None where the client has gone before its end."""
    lengths = _headers(scope, b"content-length")
    if lengths and _headers(scope, b"transfer-encoding"):  # a proxy before this server may believe the other
        raise ApiError(400, "Content-Length and Transfer-Encoding; accepted: one of them", code="length")
    too_large = ApiError(413, f"the body is too large; accepted: {MAX_BODY >> 20} MiB", code="too_large")
    if any(int(length) > MAX_BODY for length in lengths):
        raise too_large
    body = bytearray()
    try:
        with anyio.fail_after(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > MAX_BODY:
                    raise too_large
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, f"the body took more than {BODY_SECONDS} s", code="timeout") from None


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that has been read, and then what else comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_again
