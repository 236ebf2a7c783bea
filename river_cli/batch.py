"""`river batch`: a file of prompts to a file of answers, by replicas on this machine or on several."""

import sys
from contextlib import redirect_stdout

from river_ext import scale
from river_ext.errors import RiverError

from .generate import own_options
from .terminal import note, print_json

# arguments of generate_file that are options
OWN = (
    "replicas", "resume", "force", "address", "river", "device", "dtype", "threads", "slots", "max_len",
    "calibrated",
)  # fmt: skip


def run(arguments) -> None:
    with redirect_stdout(sys.stderr):  # Ray's notes on what it does are no result
        summary = scale.generate_file(
            arguments.prompts,
            arguments.output,
            arguments.model,
            **{name: getattr(arguments, name) for name in OWN},
            **own_options(arguments),
            progress=True,
        )
    count, (lines, resumed, errors) = len(summary.errors), summary
    if arguments.json:
        print_json({"output": arguments.output} | summary._asdict())
    else:
        before = f", {resumed} of them by an earlier run" if resumed else ""
        note(f"{arguments.output}: {lines} answers{before}")
    if errors:
        raise RiverError(
            f"{arguments.output}: {count} of {lines} answers are errors, the first is that of line "
            f"{errors[0]} of {arguments.prompts}; accepted: prompts as their answers say"
        )
