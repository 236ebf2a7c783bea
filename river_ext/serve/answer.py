"""One request from its body to the last byte of its answer, as long as its client is there."""

import json

import anyio
from anyio.lowlevel import checkpoint
from anyio.to_thread import run_sync
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ..errors import RiverError
from .errors import ApiError
from .metrics import Metrics
from .prepare import Served
from .replies import Chat, Completion
from .schema import ChatBody, CompletionBody
from .worker import Ticket, Worker

STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # or nginx collects what should arrive at once
}
LAST_WORDS = 5  # seconds to tell a client that its time is over, who may have stopped to read
DONE = b"data: [DONE]\n\n"


class Answer(Response):
    """Its place in the server, its slot and its time end with it, however it ends."""

    def __init__(
        self,
        served: Served,
        worker: Worker,
        metrics: Metrics,
        body: CompletionBody | ChatBody,
        seconds: float,
    ):
        super().__init__()
        self.served, self.worker, self.metrics = served, worker, metrics
        self.body, self.seconds = body, seconds
        self.outcome: str | None = "disconnected"  # unless it is known better

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = Stream(send)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(_until_gone, receive, group.cancel_scope)
                await self._answer(stream, scope, receive, send)
                group.cancel_scope.cancel()
        except Exception:  # a mistake in the server: who answers then counts it, too
            self.outcome = None
            raise
        finally:
            if self.outcome:
                self.metrics.ended(self.outcome)

    async def _answer(self, stream: "Stream", scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with anyio.fail_after(self.seconds), self.worker.ticket() as ticket:
                ticket.submit(await run_sync(self.served.sequence, self.body))
                if self.body.stream:
                    self.outcome = await self._stream(ticket, stream)
                    return
                whole, self.outcome = await self._whole(ticket)
            await JSONResponse(whole)(scope, receive, send)
        except TimeoutError:
            self.outcome = "timeout"
            error = ApiError(
                504,
                f"the request took more than {self.seconds:g} s, the server's limit",
                code="timeout",
                headers={"x-should-retry": "false"},  # the openai client would, with the same end
            )
            with anyio.move_on_after(LAST_WORDS):
                await stream.fail(error, scope, receive)
        except RiverError as error:
            error = error if isinstance(error, ApiError) else ApiError(400, str(error))
            self.outcome = outcome_of(error)
            await stream.fail(error, scope, receive)

    async def _whole(self, ticket: Ticket) -> tuple[dict, str]:
        tokens = []
        async for news in ticket:
            tokens += news.tokens
        return self._reply(ticket).whole(tokens, news.output), news.output.finish_reason

    async def _stream(self, ticket: Ticket, stream: "Stream") -> str:
        """A chunk holds a text that is not empty, and all tokens since the chunk before."""
        reply, tokens = self._reply(ticket), []
        async for news in ticket:
            tokens += news.tokens
            if news.output or any(token.text for token in tokens):
                await stream.send(reply.chunk(tokens, news.output, first=not stream.started))
                tokens = []
        if self.body.stream_options.include_usage:
            await stream.send(reply.usage_chunk(news.output))
        await stream.end(DONE)
        return news.output.finish_reason

    def _reply(self, ticket: Ticket) -> Completion | Chat:
        kind = Chat if isinstance(self.body, ChatBody) else Completion
        return kind(self.served, self.body, ticket)


class Stream:
    """Server-sent events. The status is that of the first: an error before it is an answer of its own."""

    def __init__(self, send: Send):
        self._send, self.started = send, False

    async def send(self, event: dict) -> None:
        await self._write(_event(event))

    async def end(self, data: bytes) -> None:
        await self._write(data, more=False)

    async def fail(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        if self.started:
            await self.end(_event(error.body()))
        else:
            await error_response(error)(scope, receive, self._send)

    async def _write(self, data: bytes, more: bool = True) -> None:
        await checkpoint()  # where nothing waits, the loop would not hear that the client has gone
        if not self.started:
            self.started = True
            headers = [(name.encode(), value.encode()) for name, value in STREAM_HEADERS.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


def outcome_of(error: ApiError) -> str:
    """As metrics count it."""
    return "full" if error.status == 429 else "refused" if error.status < 500 else "error"


def _event(document: dict) -> bytes:
    return b"data: " + json.dumps(document, allow_nan=False).encode() + b"\n\n"


async def _until_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    """Cancels the answer to a client who has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
