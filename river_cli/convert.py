"""`river convert`: builds the 4-bit river of a model and saves it."""

import os
import shlex
import time
from pathlib import Path

from river_ext.errors import RiverError
from river_ext.loading.checkpoint import load_checkpoint
from river_ext.model import choose_device
from river_ext.quant.exit_river import build_river, save_river
from river_ext.quant.quality import quantisation_errors
from river_ext.quant.river_store import FACTS, refuse_other_content

from . import shared
from .terminal import print_json, printable, size_text


def run(arguments) -> None:
    output = Path(arguments.output)
    _check_output(output, arguments.force)
    checkpoint = load_checkpoint(
        shared.directory(arguments), arguments.dtype, choose_device(arguments.device)
    )
    config, weights = checkpoint.config, checkpoint.weights
    start = time.perf_counter()
    river = build_river(config, weights, arguments.group_size, progress=not arguments.json)
    seconds = time.perf_counter() - start
    errors = quantisation_errors(config, weights, river)
    save_river(output, river, config, checkpoint.fingerprint)
    size = sum(file.stat().st_size for file in output.iterdir())
    if arguments.json:
        print_json(
            {
                "output": str(output),
                "model": str(checkpoint.directory),
                "fingerprint": checkpoint.fingerprint,
                "group_size": river.group_size,
                "quantiser": river.quantiser,
                "seconds": seconds,
                "bytes": size,
                "relative_squared_error": errors,
            }
        )
        return
    print(f"{output}: {len(river)} exit layers and a head, {size_text(size)}, quantised in {seconds:.1f} s")
    print("mean squared error, in parts of the weights' mean square:")
    for name, error in errors.items():
        print(f"  {name:10}  {error:.5f}")
    print(f"\nIt is used with\n  {printable(_use(arguments))}")


def _use(arguments) -> str:
    """The command that generates with what was written."""
    model = ["--demo"] if arguments.model is None else ["--model", arguments.model]
    return shlex.join(["river", "generate", *model, "--river", arguments.output, "a prompt"])


def _check_output(output: Path, force: bool) -> None:
    """Refuses an output before the work: save_river would do so after it."""
    refuse_other_content(output)
    if (output / FACTS).exists() and not force:
        raise RiverError(f"{output}: exists; accepted: a new directory, or --force to replace a saved river")
    parent = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RiverError(f"{output}: cannot be written, {parent} is no directory that can be written to")
