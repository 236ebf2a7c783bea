"""The routes."""

import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse

from ..checks import short
from ..trace import policy_of
from .answer import Answer, error_response, outcome_of
from .errors import ApiError
from .guard import Guard
from .metrics import Metrics
from .prepare import Served
from .schema import ChatBody, CompletionBody, FieldError
from .worker import Worker

PAGE = Path(__file__).with_name("page.html")
MOST_WAITING, MOST_SECONDS = 100_000, 7 * 24 * 3600.0  # that a server may be told to allow


def make_app(
    served: Served,
    *,
    waiting: int,
    seconds: float,
    key: str | None = None,
    hosts: Iterable[str] | None = None,
    replica: str | None = None,
) -> FastAPI:
    """The ASGI app around a model. Its thread runs from its startup to its shutdown.

    Args:
        waiting: requests that may wait for a slot.
        seconds: of a request, from its arrival to its last byte.
        key: that requests must have; None asks for none.
        hosts: names that the header Host may have; None allows all.
        replica: the name of this server among others that answer at the same address.
    """
    metrics = Metrics(served.model.config.num_hidden_layers, served.engine.slots, replica)
    worker = Worker(served.engine, waiting, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()

    app = FastAPI(title="river serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.worker = worker
    app.add_middleware(Guard, metrics=metrics, key=key, hosts=hosts)
    _add_errors(app, metrics)
    _add_generation(app, served, worker, metrics, seconds)
    _add_models(app, served)
    _add_page(app)
    _add_state(app, served, worker, metrics)
    return app


def _add_generation(app: FastAPI, served: Served, worker: Worker, metrics: Metrics, seconds: float) -> None:
    def answer(body: CompletionBody | ChatBody) -> Answer:
        if body.model is not None:
            served.check_name(body.model)
        return Answer(served, worker, metrics, body, seconds)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody) -> Response:
        return answer(body)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody) -> Response:
        return answer(body)


def _add_models(app: FastAPI, served: Served) -> None:
    started = int(time.time())

    def facts() -> dict:
        """A model in OpenAI's form, and what the page wants to know."""
        river = {
            "chat": served.chats,
            "layers": served.model.config.num_hidden_layers,
            "mode": served.mode,
            "threshold": served.shown_threshold,
            "slots": served.engine.slots,
        }
        head = {"id": served.name, "object": "model", "created": started, "owned_by": "river_ext"}
        return head | {"max_model_len": served.positions, "river": river}

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [facts()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict:
        served.check_name(name)
        return facts()


def _add_page(app: FastAPI) -> None:
    source = PAGE.read_text(encoding="utf-8")
    policy = f"{policy_of(source)}; connect-src 'self'; frame-ancestors 'none'"
    page_headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(source, headers=page_headers)


def _add_state(app: FastAPI, served: Served, worker: Worker, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> Response:
        if worker.failure:
            return JSONResponse({"status": "failed", "error": str(worker.failure)}, 503)
        return JSONResponse({"status": "ok", "model": served.name})

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(metrics.text(worker), media_type=CONTENT_TYPE_LATEST)


# --- errors ---------------------------------------------------------------------------------------------


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    def answered(error: ApiError) -> Response:
        metrics.ended(outcome_of(error))
        return error_response(error)

    @app.exception_handler(ApiError)
    async def own(request: Request, error: ApiError) -> Response:
        return answered(error)

    @app.exception_handler(RequestValidationError)
    async def body(request: Request, error: RequestValidationError) -> Response:
        return answered(body_error(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        path = f"{request.method} {short(request.url.path)}"
        message = {404: f"{path}: no such path", 405: f"{path}: no such method"}.get(error.status_code)
        return answered(ApiError(error.status_code, message or str(error.detail), headers=error.headers))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return answered(ApiError(500, f"{type(error).__name__} in the server", code="bug"))


def body_error(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is no JSON ({why} at character {first['loc'][-1]})", code="json")
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return ApiError(400, f"{param or 'a JSON body'} is missing", param=param)
    if param and first["type"] != "value_error":
        message = f"{param}={short(first['input'])}: {message[:1].lower()}{message[1:]}"
    elif param:
        message = f"{param}: {message}"
    if isinstance(cause := first.get("ctx", {}).get("error"), FieldError):
        param = f"{param}.{cause.field}" if param else cause.field
    return ApiError(400, message, param=param)
