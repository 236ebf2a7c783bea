"""The parser of the command line: every command with its options."""

import argparse
from collections.abc import Mapping

from .errors import UsageError
from .option_groups import (
    KV_STRATEGIES,
    add_batch,
    add_calibrate,
    add_chat,
    add_file,
    add_machine,
    add_model,
    add_offloading,
    add_options,
    add_prompts,
    add_river,
    add_serving,
    add_tasks,
)
from .values import given


def make_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser of all, and those of the commands by name."""
    parser = _Parser(
        prog="river",
        description="Training-free, token-level early exit for unmodified Hugging Face language models.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, module, text, add_own in COMMANDS:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(module=module, threads=None)
        command.add_argument("--json", action="store_true", help="print one JSON document")
        add_own(command)
    return parser, commands.choices


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        message = message if len(message) <= 200 else message[:197] + "..."
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import PackageNotFoundError, version

        try:
            print("river", version("river_ext"))
        except PackageNotFoundError:  # a checkout that is not installed
            from river_ext import __version__

            print("river", __version__)
        parser.exit()


# --- what a command has of its own -----------------------------------------------------------------------


def _generate(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "the bundled model; without a prompt it shows what River does", directory=False)
    add_river(parser, "a saved river; without it one is built, for minutes if the model is large")
    add_machine(parser)
    add_offloading(parser)
    add_prompts(parser)
    parser.add_argument(
        "--compare", action="store_true", help="also run full depth, lossless and full W4, and print a table"
    )
    parser.add_argument(
        "--trace",
        type=given,
        metavar="FILE",
        help="write each token's exit depth: .html to look at, or .json",
    )
    add_options(parser)


def _chat(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "the bundled model, which has no chat template", required=True)
    add_river(parser, "a saved river; without it one is built")
    add_machine(parser)
    add_offloading(parser)
    parser.add_argument("--system", type=given, metavar="TEXT", help="what the model is told first")
    add_options(
        parser, modes="lossless (default, unless an option of river is given), river, full or full_w4"
    )


def _serve(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "the bundled model, which has no chat template", required=True)
    add_river(parser, "a saved river; without it one is built")
    add_machine(parser)
    add_serving(parser)


def _batch(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "the bundled model", required=True)
    add_river(parser, "a saved river; without it each replica builds one")
    add_machine(parser)
    add_batch(parser)
    add_options(parser, engine=False)


def _info(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "the bundled model")
    add_river(parser, "a saved river of that model, whose facts are shown too")


def _convert(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "the bundled model", required=True)
    add_machine(parser)
    parser.add_argument("-o", "--output", type=given, required=True, metavar="DIR", help="the new directory")
    parser.add_argument("--group-size", type=int, choices=(64, 128), help="columns that share a scale (64)")
    parser.add_argument(
        "--river-from",
        type=given,
        metavar="PATH",
        help="take the 4-bit weights of the same model in the format AWQ, GPTQ, compressed-tensors or GGUF",
    )
    parser.add_argument(
        "--calibrate",
        type=given,
        metavar="FILE",
        help="refine it with texts: blank lines between, or .jsonl with a field text; takes minutes",
    )
    parser.add_argument("--force", action="store_true", help="replace a river that is there already")


def _eval(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "the bundled model's held-out problems and functions", exclusive=False)
    add_river(parser, "a saved river; without it one is built")
    add_machine(parser)
    add_offloading(parser)
    parser.add_argument("--problems", type=int, metavar="N", help="word problems (300)")
    parser.add_argument("--functions", type=int, metavar="N", help="functions (100)")
    parser.add_argument("--thresholds", metavar="S,S,...", help="of the River rows")
    parser.add_argument("--kv-strategy", help=f"of these rows: {KV_STRATEGIES}")
    parser.add_argument("--seed", type=int, help="which held-out items (0)")
    add_tasks(parser)


def _calibrate(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "the bundled model; without --prompts on its held-out problems", required=True)
    add_river(parser, "a saved river; without it one is built")
    add_machine(parser)
    add_calibrate(parser)


def _bench(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "the bundled model", required=True)
    add_river(parser, "a saved river; without it one is built, for minutes if the model is large")
    add_machine(parser)
    parser.set_defaults(resident_layers=None)
    prompts = parser.add_mutually_exclusive_group()
    add_file(prompts)
    prompts.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="a prompt of so many random token ids"
    )
    add_chat(parser)
    parser.add_argument(
        "--new-tokens", type=int, default=64, metavar="N", help="at most, of each prompt (64)"
    )
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="of all settings (5)")
    parser.add_argument("--thresholds", metavar="S,S,...", help="of the River rows (0.5)")
    parser.add_argument("--min-layers", type=int, metavar="N", help="of these, before an exit (1)")
    parser.add_argument("--river-head", help="of full W4 and River: model (default) or w4")


# name, module that runs it, what it does, its options
COMMANDS = (
    ("generate", "generate", "continue prompts through the exit river", _generate),
    ("chat", "chat", "talk with a model; the turns before stay in the cache", _chat),
    ("serve", "serve", "serve a model over HTTP, by OpenAI's API, with a page to talk with it", _serve),
    ("batch", "batch", "answer a file of prompts, by several processes or machines", _batch),
    ("info", "info", "show what this installation was built with, and the facts of a model", _info),
    (
        "convert",
        "convert",
        "build the 4-bit river of a model and save it, or make a model of a GGUF file",
        _convert,
    ),
    ("eval", "evaluate", "measure quality and speed against full depth", _eval),
    ("calibrate", "calibrate", "choose a threshold for a target, on prompts of your own", _calibrate),
    ("bench", "bench", "measure the speed of full depth, lossless, full W4 and River in turns", _bench),
)
