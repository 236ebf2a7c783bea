"""The API of `river serve` in front of replicas: an application of Ray Serve."""

from typing import Literal

import click
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.exceptions import RayError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..checks import short
from ..engine.request import request
from ..errors import RiverError
from ..loading.config import read_config
from ..loading.files import is_regular
from ..serve.app import MOST_SECONDS, MOST_WAITING, make_app
from ..serve.guard import LOOPBACK, environment_key
from ..serve.prepare import MODES, Served
from .replica import MOST_REPLICAS, Replica, checked_replica

HEALTH_SECONDS = 2  # between two looks at an engine; Ray replaces a replica after three failures


class Arguments(BaseModel):
    """What `app` takes: the options of `river serve`, and those of replicas."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, min_length=1)
    river: str | None = Field(None, min_length=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: str = "auto"
    replicas: int = Field(1, ge=1, le=MOST_REPLICAS)
    max_replicas: int | None = Field(None, ge=1, le=MOST_REPLICAS)
    threads: int | None = Field(None, ge=1)
    slots: int = Field(8, ge=1, le=8)
    max_len: int | None = Field(None, ge=1)
    mode: Literal[MODES] = "lossless"
    threshold: float | None = None
    calibrated: str | None = Field(None, min_length=1)
    queue: int = Field(64, ge=0, le=MOST_WAITING)
    timeout: float = Field(600.0, gt=0, le=MOST_SECONDS)
    hosts: str = ",".join(LOOPBACK)


class BadArgument(RiverError, click.ClickException):
    """`serve run` prints it as one line."""

    def __init__(self, message: str):
        click.ClickException.__init__(self, str(RiverError(message)))


def app(arguments: dict) -> serve.Application:
    """The application, by the arguments of `serve run` or of a config file.

    The environment variable RIVER_API_KEY is the key that requests must have. It is read here.

    Args:
        arguments: by name, as numbers or as text:
            model, river, device, dtype, slots, max_len, mode, threshold, calibrated, timeout: as in `river
                serve`. Paths are the same on all machines; device is "auto", "cpu" or "cuda".
            replicas: that run; with max_replicas those that run at least.
            max_replicas: there are more than `replicas`, up to so many, while more than `slots` requests
                come to each. None starts no more.
            threads: cores of a replica; this machine's, shared out, where nobody says. 1 beside a GPU.
            queue: requests that may wait at each proxy of Ray Serve, beside those in replicas.
            hosts: names that the header Host may have, with commas between; * allows all.

    Raises:
        RiverError: an argument is not accepted.
    """
    asked = _checked(arguments)
    most = asked.max_replicas or asked.replicas
    names = ("river", "device", "dtype", "threads", "slots", "max_len", "calibrated")
    try:
        own = {name: getattr(asked, name) for name in names}
        replica = checked_replica(asked.model, replicas=most, **own)
        _check_model(replica, asked)
        key = environment_key()
    except RiverError as error:
        raise BadArgument(str(error)) from None

    @serve.ingress(lambda: replica_app(replica, asked, key))
    class River:
        def check_health(self) -> None:
            if failure := self.app.state.worker.failure:
                raise RuntimeError(str(failure))

    return serve.deployment(River, name="river").options(**_options(replica, asked)).bind()


def replica_app(replica: Replica, asked: Arguments, key: str | None) -> FastAPI:
    """The ASGI app of a replica, in its process."""
    model, engine = replica.load()
    served = Served(model, engine, asked.mode, asked.threshold)
    hosts = asked.hosts.lower().split(",")
    app = make_app(
        served,
        waiting=_most_ongoing(replica) - replica.slots,
        seconds=asked.timeout,
        key=key,
        hosts=None if "*" in hosts else [host.strip() for host in hosts],
        replica=serve.get_replica_context().replica_id.unique_id,
    )
    app.add_middleware(Gone)
    return app


class Gone:
    """ASGI middleware: Ray may tell of a client who has gone by an exception, where ASGI has a message."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def received() -> Message:
            try:
                return await receive()
            except RayError:
                return {"type": "http.disconnect"}

        await self.app(scope, received, send)


def _most_ongoing(replica: Replica) -> int:
    """Requests at a replica: as many as its slots hold wait there, so that none of them is ever free."""
    return 2 * replica.slots


def _options(replica: Replica, asked: Arguments) -> dict:
    """Of the deployment."""
    count = {"num_replicas": asked.replicas}
    if asked.max_replicas is not None:
        count = {
            "autoscaling_config": {
                "min_replicas": asked.replicas,
                "max_replicas": asked.max_replicas,
                "target_ongoing_requests": replica.slots,
            }
        }
    return count | {
        "max_ongoing_requests": _most_ongoing(replica),
        "max_queued_requests": asked.queue,
        "ray_actor_options": replica.resources,
        "health_check_period_s": HEALTH_SECONDS,
        "graceful_shutdown_timeout_s": asked.timeout,  # a replica that is not needed ends its requests first
    }


def _checked(arguments: dict) -> Arguments:
    try:
        asked = Arguments.model_validate(arguments)
    except ValidationError as error:
        raise BadArgument(_first_line(error)) from None
    if asked.max_replicas is not None and asked.max_replicas < asked.replicas:
        raise BadArgument(
            f"max_replicas={asked.max_replicas}; accepted: replicas, {asked.replicas} here, or more"
        )
    return asked


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"no argument {short(name)}; accepted: {', '.join(Arguments.model_fields)}"
    return f"{name}={short(first['input'])}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _check_model(replica: Replica, asked: Arguments) -> None:
    """What its directory alone can refuse, before replicas start."""
    options = {"mode": asked.mode, "max_new_tokens": 1}
    if asked.threshold is not None:
        options["threshold"] = asked.threshold
    request(read_config(replica.directory), None, [0], options)
    if not is_regular(replica.directory / "tokenizer.json"):
        raise RiverError(f"{replica.directory}: has no tokenizer.json; accepted: a model with a tokenizer")
