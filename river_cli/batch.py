"""`river batch`: a file of prompts to a file of answers, by replicas on this machine or on several."""

import sys
from contextlib import redirect_stdout

from river_ext import scale
from river_ext.errors import RiverError

from .generate import own_options
from .terminal import note, print_json


def run(arguments) -> None:
    generate_file = scale.generate_file
    with redirect_stdout(sys.stderr):  # Ray's notes on what it does are no result
        summary = generate_file(
            arguments.prompts,
            arguments.output,
            arguments.model,
            replicas=arguments.replicas,
            resume=arguments.resume,
            force=arguments.force,
            address=arguments.address,
            river=arguments.river,
            device=arguments.device,
            dtype=arguments.dtype,
            threads=arguments.threads,
            slots=arguments.slots,
            max_len=arguments.max_len,
            calibrated=arguments.calibrated,
            progress=True,
            **own_options(arguments),
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
