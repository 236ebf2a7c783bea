"""`river convert`: builds the 4-bit river of a model and saves it, or makes a checkpoint of a GGUF file."""

import os
import shlex
import time
from pathlib import Path

from river_ext.calibration.river import calibrate_river, calibration_texts
from river_ext.errors import RiverError
from river_ext.loading.checkpoint import load_checkpoint
from river_ext.loading.gguf_checkpoint import convert_gguf
from river_ext.loading.gguf_file import names_gguf
from river_ext.loading.texts import read_texts
from river_ext.model import choose_device
from river_ext.quant.exit_river import build_river, save_river
from river_ext.quant.imported.build import import_river
from river_ext.quant.quality import quantisation_errors
from river_ext.quant.river_store import FACTS, refuse_other_content

from . import shared
from .shared import dtype_name
from .terminal import print_json, printable, size_text


def run(arguments) -> None:
    if names_gguf(shared.directory(arguments)):
        _convert_gguf(arguments)
    else:
        _convert_river(arguments)


def _convert_gguf(arguments) -> None:
    path, output = shared.directory(arguments), Path(arguments.output)
    converted = convert_gguf(path, output, arguments.dtype, progress=not arguments.json)
    config = converted.config
    size = sum(file.stat().st_size for file in output.iterdir())
    if arguments.json:
        print_json(
            {
                "output": str(output),
                "model": str(path),
                "model_type": config.model_type,
                "num_hidden_layers": config.num_hidden_layers,
                "dtype": dtype_name(config),
                "tensors": converted.kinds,
                "tokenizer": converted.tokenizer,
                "bytes": size,
            }
        )
        return
    tensors = ", ".join(f"{count} {kind}" for kind, count in converted.kinds.items())
    tokenizer = "" if converted.tokenizer else "; no tokenizer was in the file: prompts are token ids"
    print(
        f"{output}: {config.model_type}, {config.num_hidden_layers} layers in {dtype_name(config)}, "
        f"{size_text(size)}, from {tensors}{tokenizer}"
    )
    use = shlex.join(["river", "generate", "--model", arguments.output, "a prompt"])
    print(f"\nIt is used with\n  {printable(use)}")


def _convert_river(arguments) -> None:
    output = Path(arguments.output)
    _check_output(output, arguments.force)
    texts = read_texts(arguments.calibrate) if arguments.calibrate else None
    checkpoint = load_checkpoint(
        shared.directory(arguments), arguments.dtype, choose_device(arguments.device)
    )
    config, weights = checkpoint.config, checkpoint.weights
    if texts:
        texts = calibration_texts(checkpoint, texts, arguments.calibrate)
    start, progress = time.perf_counter(), not arguments.json
    if arguments.river_from:
        river = import_river(arguments.river_from, config, weights, progress)
    else:
        river = build_river(config, weights, arguments.group_size or 64, progress)
    if texts:
        river = calibrate_river(checkpoint, river, texts, output, progress)
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
                "calibration": river.calibration,
                "imported": river.imported,
                "seconds": seconds,
                "bytes": size,
                "relative_squared_error": errors,
            }
        )
        return
    done = "imported" if river.imported else "quantised"
    print(f"{output}: {len(river)} exit layers and a head, {size_text(size)}, {done} in {seconds:.1f} s")
    if river.imported:
        print(printable(shared.import_line(river.imported)))
    print("mean squared error, in parts of the weights' mean square:")
    for name, error in errors.items():
        print(f"  {name:10}  {error:.5f}")
    if river.calibration:
        print(_gain(river.calibration))
    print(f"\nIt is used with\n  {printable(_use(arguments))}")


def _gain(calibration: dict) -> str:
    agreement, kl = (
        f"{form.format(calibration[name + '_before'])} before, {form.format(calibration[name])} now"
        for name, form in (("agreement", "{:.1%}"), ("kl", "{:.4f}"))
    )
    return (
        f"calibrated on {calibration['tokens']} tokens of {calibration['texts']} texts; on "
        f"{calibration['held_out_tokens']} tokens of others:\n"
        f"  the same next token as full depth  {agreement}\n"
        f"  KL from full depth, nats per token {kl}"
    )


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
