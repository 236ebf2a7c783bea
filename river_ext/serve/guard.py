"""What a request has to pass before the app sees it: its host, its key, the size and time of its body.

All bodies together have their limit, too, from their first byte to the end of their answer.
"""

import hmac
import re
from collections.abc import Iterable

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answer import error_response, outcome_of
from .errors import ApiError
from .metrics import Metrics

MAX_BODY, MAX_BODIES = 8 << 20, 64 << 20  # bytes of one, and of all that are read or answered
SMALL_BODY = 64 << 10  # that large ones cannot keep out
BODY_SECONDS = 30  # for all of it
OPEN = ("/", "/health")  # without a key: the page asks for one, and probes have none
PORT = re.compile(r":\d*$")
LOOPBACK = ("127.0.0.1", "[::1]", "localhost")


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics, key: str | None, hosts: Iterable[str] | None):
        """hosts: names that the header Host may have; None allows all."""
        self.app, self.metrics = app, metrics
        self.key = None if key is None else key.encode()
        self.hosts = hosts
        self._held = 0  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body = bytearray()
        try:
            if await self._accepts(body, scope, receive, send):
                await self.app(scope, _again(bytes(body), receive), send)
        finally:
            self._held -= len(body)

    async def _accepts(self, body: bytearray, scope: Scope, receive: Receive, send: Send) -> bool:
        """Whether the app is to see the request, whose body is all there then."""
        try:
            self._check_host(scope)
            self._check_key(scope)
            return await self._read(body, scope, receive)
        except ApiError as error:
            self.metrics.ended(outcome_of(error))
            # the rest of the body is not read, so the connection cannot go on
            error.headers["connection"] = "close"
            await error_response(error)(scope, receive, send)
            return False

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

    async def _read(self, body: bytearray, scope: Scope, receive: Receive) -> bool:
        """Whether all of a body is there; else the client has gone."""
        lengths = _headers(scope, b"content-length")
        if lengths and _headers(scope, b"transfer-encoding"):  # a proxy in front may believe the other
            raise ApiError(400, "Content-Length and Transfer-Encoding; accepted: one of them", code="length")
        self._check_size(max(map(int, lengths), default=0), self._held)
        try:
            with anyio.fail_after(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    part = message.get("body", b"")
                    self._check_size(len(body) + len(part), self._held - len(body))
                    body += part
                    self._held += len(part)
                    if not message.get("more_body"):
                        return True
        except TimeoutError:
            raise ApiError(408, f"the body took more than {BODY_SECONDS} s", code="timeout") from None

    def _check_size(self, size: int, others: int) -> None:
        """Of a body, and of all others."""
        if size > MAX_BODY:
            message = f"the body is too large; accepted: {MAX_BODY >> 20} MiB"
            raise ApiError(413, message, code="too_large")
        if size > SMALL_BODY and others + size > MAX_BODIES:
            raise ApiError(
                429,
                f"other bodies have {others >> 20} MiB; accepted: {MAX_BODIES >> 20} MiB in all, try again "
                f"later, or with up to {SMALL_BODY >> 10} KiB",
                code="bodies_full",
                headers={"Retry-After": "1"},
            )


def _headers(scope: Scope, name: bytes) -> list[bytes]:
    return [value for header, value in scope["headers"] if header == name]


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that has been read, and then what else comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_again
