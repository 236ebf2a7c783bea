"""`river serve`: a model behind OpenAI's HTTP API, and a page to talk with it."""

import os
import sys
from ipaddress import ip_address

from river_ext.checks import integer, number
from river_ext.engine.request import request
from river_ext.errors import RiverError

from . import shared
from .terminal import note, print_json

KEY = "RIVER_API_KEY"  # an environment variable: a command line can be read by all users of a machine
MOST_WAITING, MOST_SECONDS = 100_000, 7 * 24 * 3600.0


def run(arguments) -> None:
    server, app, prepare, guard = _modules()
    waiting = integer("--queue", arguments.queue, 0, MOST_WAITING)
    port = integer("--port", arguments.port, 0, 65535)
    seconds = number("--timeout", arguments.timeout)
    if not 0 < seconds <= MOST_SECONDS:
        raise RiverError(f"--timeout {seconds:g}; accepted: seconds above 0, up to {MOST_SECONDS:.0f}")
    key = _key()
    _check_options(arguments, prepare.MODES)
    bound = server.bound_socket(arguments.host, port, seconds)
    model = shared.load(arguments)
    if model.text is None:
        raise RiverError(f"{model.directory}: has no tokenizer.json; accepted: a model with a tokenizer")
    with model.engine(
        slots=arguments.slots, max_len=arguments.max_len, reuse_prompts=arguments.reuse_prompts
    ) as engine:
        served = prepare.Served(model, engine, arguments.mode, arguments.threshold)
        address, hosts = bound.getsockname()[0], None
        if ip_address(address).is_loopback:
            hosts = sorted({*guard.LOOPBACK, address, arguments.host.lower()})
        made = app.make_app(served, waiting=waiting, seconds=seconds, key=key, hosts=hosts)
        server.run(made, bound, lambda: _say_ready(arguments, served, server.url_of(bound), key))


def _modules() -> tuple:
    try:
        from river_ext.serve import app, guard, prepare, server
    except ModuleNotFoundError as error:
        raise RiverError(
            f"river serve needs the module {error.name}; accepted: after pip install 'river_ext[serve]'"
        ) from None
    return server, app, prepare, guard


def _key() -> str | None:
    key = os.environ.get(KEY)
    if key is not None and (not key.isascii() or not key.isprintable() or key != key.strip() or not key):
        raise RiverError(f"{KEY} is no key; accepted: printable ASCII characters without blanks around them")
    return key


def _check_options(arguments, modes: tuple[str, ...]) -> None:
    """What the config alone can refuse, before weights are loaded."""
    if arguments.mode not in modes:
        raise RiverError(f"--mode {arguments.mode!r}; accepted: {', '.join(modes)}")
    options = {"mode": arguments.mode, "max_new_tokens": 1}
    if arguments.threshold is not None:
        options["threshold"] = arguments.threshold
    config = shared.config(arguments)
    request(config, None, [0], options)
    integer("--slots", arguments.slots, 1, 8)
    if arguments.max_len is not None:
        integer("--max-len", arguments.max_len, 1, config.max_length)


def _say_ready(arguments, served, url: str, key: str | None) -> None:
    facts = {
        "url": url,
        "model": served.name,
        "mode": served.mode,
        "slots": served.engine.slots,
        "positions": served.positions,
        "api_key": key is not None,
    }
    if arguments.json:
        print_json(facts)
        sys.stdout.flush()
        return
    locked = f"the API key of {KEY}" if key else "no API key"
    note(
        f"{shared.model_line(served.model)}\n{url} (the API under {url}/v1), mode {served.mode}, "
        f"{served.engine.slots} slots of up to {served.positions} tokens, {locked}"
    )
