"""The command `river`. Results go to standard output, progress and notes to standard error.

Exit code 0 is success, 2 bad input with one line `river: error: ...`, 130 an interrupt. With --json standard
output holds one JSON document and nothing else.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from .. import __version__
from ..errors import RiverError
from .convert import run_convert
from .evaluate import run_eval
from .generate import run_generate
from .info import run_info

# What a command needs is imported when it runs, so that --help and errors come fast: the modules of this
# package import at their top only what is light.


def main(argv: Sequence[str] | None = None) -> int:
    try:
        _never_fail_to_print()
        arguments = _parser().parse_args(argv)
        arguments.command(arguments)
        sys.stdout.flush()
    except RiverError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        print("\nriver: interrupted", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    print(f"river: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _never_fail_to_print() -> None:
    """A character that the terminal's encoding lacks becomes a question mark."""
    for file in (sys.stdout, sys.stderr):
        if hasattr(file, "reconfigure"):
            file.reconfigure(errors="replace")


# --- arguments ------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise RiverError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="river",
        description="Training-free, token-level early exit for unmodified Hugging Face language models.",
    )
    parser.add_argument("--version", action="version", version=f"river {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, run: Callable, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(command=run)
        added.add_argument("--json", action="store_true", help="print one JSON document")
        return added

    generate = command("generate", run_generate, "continue prompts through the exit river")
    _add_model(generate, "the bundled model; without a prompt it shows what River does")
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="1 to 8 prompts; - is standard input")
    generate.add_argument("--file", action="append", metavar="FILE", help="a file that holds a prompt")
    generate.add_argument(
        "--compare", action="store_true", help="also run full depth and full W4, and print a table"
    )
    generate.add_argument("--max-new-tokens", type=int, metavar="N", help="default 256")
    generate.add_argument("--threshold", type=float, metavar="S", help="exit above this similarity (0.5)")
    generate.add_argument("--min-layers", type=int, metavar="N", help="backbone layers before an exit (1)")
    generate.add_argument("--prefill", metavar="POLICY", help="full (default), depth:K, min or last")
    generate.add_argument("--mode", help="river (default), full or full_w4")
    generate.add_argument("--temperature", type=float, metavar="T", help="0, the default, is greedy")
    generate.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest; 0 is all")
    generate.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest; 1 is all")
    generate.add_argument("--seed", type=int, help="of sampling, and of the demo's prompts (0)")
    generate.add_argument("--stop", action="append", metavar="TEXT", help="end before this text")
    generate.add_argument("--exit-control", help="where exits are decided: auto (default), host or device")

    info = command("info", run_info, "show this installation, and the facts of a model")
    _add_model(info, "the bundled model", device=False)

    convert = command("convert", run_convert, "build the 4-bit river of a model and save it")
    _add_model(convert, "the bundled model", required=True, river=False)
    convert.add_argument("--output", required=True, metavar="DIR", help="the river's new directory")
    convert.add_argument(
        "--group-size", type=int, choices=(64, 128), default=64, help="columns that share a scale (64)"
    )
    convert.add_argument("--force", action="store_true", help="replace a river that is there already")

    evaluate = command("eval", run_eval, "measure quality and speed against full depth")
    _add_model(evaluate, "the bundled model's held-out problems and functions", exclusive=False)
    evaluate.add_argument("--problems", type=int, default=300, metavar="N", help="word problems (300)")
    evaluate.add_argument("--functions", type=int, default=100, metavar="N", help="functions (100)")
    evaluate.add_argument("--thresholds", metavar="S,S,...", help="of the River rows")
    evaluate.add_argument("--seed", type=int, default=0, help="which held-out items (0)")
    return parser


def _add_model(
    parser: argparse.ArgumentParser,
    demo: str,
    required: bool = False,
    river: bool = True,
    exclusive: bool = True,
    device: bool = True,
) -> None:
    group = parser.add_mutually_exclusive_group(required=required) if exclusive else parser
    group.add_argument("--model", metavar="DIR", help="a Hugging Face checkpoint directory")
    group.add_argument("--demo", action="store_true", help=demo)
    if river:
        parser.add_argument("--river", metavar="DIR", help="a saved river; none: it is built now")
    if device:
        parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")
        parser.add_argument(
            "--dtype", default="auto", help="bfloat16, float16, float32; auto: the model's own"
        )
