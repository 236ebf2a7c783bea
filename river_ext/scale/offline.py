"""A file of prompts to a file of answers, by replicas that Ray Data feeds.

Ray Data starts a replica anew that has died, with the rows that it had, and hands the answers over in the
order of the prompts. So the file of answers is at any time what a single process would have written so
far, and a run that was ended is gone on with at its end.
"""

import hashlib
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import ray
from ray.exceptions import RayError

from .. import __version__
from ..checks import flag, integer, short, strings
from ..engine.request import request
from ..errors import RiverError
from ..loading.calibrated import read_calibrated
from ..loading.chat import read_template
from ..loading.checkpoint import fingerprint
from ..loading.config import ModelConfig, read_config
from ..progress import progress_bar
from ..quant.exit_river import read_facts
from .answering import Answering, count_tries
from .lines import Answers, Line, read_lines
from .replica import MOST_REPLICAS, Replica, checked_replica

ROWS = 64  # that a replica takes at a time
REACHED_SECONDS = 5  # by a cluster that is there
STORE_BYTES = 128 << 20  # of a cluster for one file, whose rows are texts
# Ray would print a stack for every error and a warning for every replica. What the environment says holds.
QUIET = {"RAY_DATA_LOG_LEVEL": "CRITICAL", "RAY_BACKEND_LOG_LEVEL": "fatal"}
TEXT_FILES = ("*token*.json", "*.jinja", "additional_chat_templates/*.jinja")  # from text to tokens, and back


class Summary(NamedTuple):
    """What a file of answers holds now."""

    lines: int
    resumed: int  # of these, from an earlier run
    errors: list[int]  # numbers of the lines of prompts whose answer is an error


def generate_file(
    prompts: str | Path,
    answers: str | Path,
    model: str | Path | None = None,
    *,
    replicas: int = 1,
    resume: bool = False,
    force: bool = False,
    address: str | None = None,
    river: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    slots: int = 8,
    max_len: int | None = None,
    calibrated: str | Path | None = None,
    progress: bool = False,
    **options,
) -> Summary:
    """Answers every line of a file, in its order, each as `Model.generate` would answer it alone.

    Args:
        prompts: JSON lines: {"prompt": text or token ids} or {"messages": [...]}, beside them `options`, an
            object with options of this line alone, and any other fields, which the answer repeats.
        answers: JSON lines: the fields of the prompt's line, "run", and "output": text, tokens, exit_depths
            and finish_reason; "error" in its place, a text, where a prompt is too long, say, or has ended the
            replicas that tried it.
        model: a checkpoint's directory, the same path on all machines; None is the bundled one.
        replicas: processes with the model, each with `threads` cores, and a GPU if the device is "cuda".
        resume: go on with a file of answers; without one begin it.
        force: replace a file of answers.
        address: of a Ray cluster; None is the environment's RAY_ADDRESS, or else a cluster of this machine's
            own that ends with the call. Ray is used as it is where it has been initialised.
        device: "cpu", "cuda" or "auto".
        threads: None shares out the cores of this machine; 1 beside a GPU.
        river, dtype, calibrated: as in `river_ext.load`.
        slots, max_len: as in `Model.engine`.
        progress: show on standard error how far it is.
        options: those of `Model.generate`, for all lines. Engine options and return_logits are not among
            them: requests do not see each other, and logits are no text.

    Raises:
        RiverError: before any work, where a line, an option or a file is not accepted; or, with the answers
            so far in the file, where replicas cannot be had or used.
    """
    replicas = integer("replicas", replicas, 1, MOST_REPLICAS)
    replica = checked_replica(
        model, replicas=replicas, river=river, device=device, dtype=dtype, threads=threads, slots=slots,
        max_len=max_len, calibrated=calibrated,
    )  # fmt: skip
    if flag("resume", resume) and flag("force", force):
        raise RiverError("resume and force; accepted: one of them")
    lines = read_lines(prompts)
    _check_options(replica, prompts, lines, options)
    how = "resume" if resume else "replace" if force else "new"
    with Answers(answers, prompts, lines, _run(replica, options), how) as file:
        left = lines[file.done :]
        if left:
            with (
                _cluster(address, replica.threads * replicas),
                progress_bar("lines", len(left), progress) as advance,
                closing(_answered(replica, replicas, left, options)) as parts,  # Ray Data, before Ray itself
            ):
                for part in parts:
                    file.append(part)
                    for _ in part:
                        advance()
        return Summary(len(lines), file.resumed, file.errors)


def _answered(
    replica: Replica, replicas: int, lines: Sequence[Line], options: Mapping
) -> Iterator[list[dict]]:
    """Answers in the order of the lines, as many at a time as come."""
    _check_room(replica)
    rows = [{"number": line.number, "line": json.dumps(line.fields)} for line in lines]
    data = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // ROWS))
    data.context.execution_options.preserve_order = True
    data.context.enable_progress_bars = False
    data = data.map_batches(
        Answering,
        fn_constructor_kwargs={"replica": replica, "options": dict(options), "tries": count_tries(replicas)},
        batch_size=None,  # a block at a time
        compute=ray.data.ActorPoolStrategy(size=replicas, max_tasks_in_flight_per_actor=2),
        **replica.resources,
    )
    try:
        for batch in data.iter_batches(batch_size=None, prefetch_batches=0):
            yield [json.loads(answer) for answer in batch["answer"]]
    except RayError as error:
        raise RiverError(f"a replica failed: {_cause(error)}") from error


@contextmanager
def _cluster(address: str | None, cores: int) -> Iterator[None]:
    """cores: of one for this call alone."""
    if ray.is_initialized():
        yield
        return
    for name, level in QUIET.items():
        os.environ.setdefault(name, level)
    quiet = {"logging_level": "error", "log_to_driver": False}
    address = address or os.environ.get("RAY_ADDRESS")
    own = {"num_cpus": cores, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    if address:
        _check_reachable(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address or "local", **quiet, **{} if address else own)
    except Exception as error:  # where a process of its own does not come up in time, that and no more
        raise RiverError(f"Ray cannot be started or reached: {error}") from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's aborts; the cluster ends without it
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():
            socket.create_connection((host.strip("[]"), int(port)), timeout=REACHED_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RiverError(
            f"address={short(address)}: {error}; accepted: that of a running Ray cluster, HOST:PORT or auto"
        ) from None


def _check_room(replica: Replica) -> None:
    """On one machine, for one at least: Ray would wait for more machines, and say so nowhere."""
    cpus, gpus = replica.resources["num_cpus"], replica.resources["num_gpus"]
    rooms = [
        (node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
        for node in ray.nodes()
        if node["Alive"]
    ]
    if not any(cpus <= has_cpus and gpus <= has_gpus for has_cpus, has_gpus in rooms):
        found = ", ".join(f"{has_cpus:g} CPU and {has_gpus:g} GPU" for has_cpus, has_gpus in rooms[:8])
        raise RiverError(
            f"a replica takes {cpus} CPU and {gpus} GPU, the machines of the cluster have {found}; accepted: "
            "a cluster with a machine that has room for one"
        )


def _check_options(replica: Replica, prompts: str | Path, lines: Sequence[Line], options: Mapping) -> None:
    """What the config alone can refuse, with the number of the line whose options they are."""
    config = read_config(replica.directory)
    if replica.calibrated is not None:
        found = read_calibrated(replica.calibrated, config.num_hidden_layers)
        config = replace(config, calibrated=found)
    _check(config, options)
    if any("messages" in line.fields for line in lines):
        read_template(replica.directory)
    for line in lines:
        if own := line.fields.get("options"):
            try:
                _check(config, options | own)
            except (RiverError, TypeError) as error:
                raise RiverError(f"{prompts}: line {line.number}: {error}") from None


def _check(config: ModelConfig, options: Mapping) -> None:
    if options.get("return_logits"):
        raise RiverError("return_logits=True; accepted: logprobs, which fit a line")
    strings("stop", options.get("stop", ()))
    integer("max_new_tokens", options.get("max_new_tokens", 1), 1, config.max_length - 1)
    request(config, None, [0], options | {"max_new_tokens": 1, "stop": ()})


def _run(replica: Replica, options: Mapping) -> str:
    """Names what the answers depend on, beside the prompts."""
    directory = replica.directory
    texts = sorted(path for name in TEXT_FILES for path in directory.glob(name))
    calibrated = None if replica.calibrated is None else Path(replica.calibrated).read_text()
    facts = {
        "version": __version__,
        "fingerprint": fingerprint(directory),
        "config": repr(read_config(directory)),
        "tokenizer": [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in texts],
        "river": None if replica.river is None else read_facts(replica.river)["sha256"],
        "device": replica.device,
        "dtype": replica.dtype,
        "max_len": replica.max_len,
        "calibrated": calibrated,
        "options": options,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _cause(error: BaseException) -> str:
    """The last line of what Ray tells: the error in the replica."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].removeprefix(f"{RiverError.__module__}.{RiverError.__name__}: ")[:300]
