"""What the command line asks for, and what can be refused by that alone."""

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence

from .errors import UsageError, did_you_mean
from .parser import make_parser
from .prompts import read_prompts, refuse_surrogates

TASK_OPTIONS = ("data", "limit", "max_gen_toks", "chat", "run_code", "score_by_steps")  # of `eval --tasks`
DEMO_OPTIONS = {"problems": 300, "functions": 100, "seed": 0}  # of `eval` without it, and their defaults


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """`module` of the result runs the command; prompts and files have become `prompts`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, commands = make_parser()
    first = {*commands, *parser._option_string_actions}
    if argv and argv[0] not in first:
        hint = did_you_mean(argv[0], first)
        raise UsageError(f"no command {argv[0][:40]!r}; accepted: {', '.join(commands)}{hint}")
    if argv and argv[0] in commands:
        _refuse_unknown_options(commands[argv[0]], argv[1:])
    arguments, rest = parser.parse_known_args(argv)
    _take_rest(commands[argv[0]], arguments, rest)
    _take_directory(arguments)
    for name, value in vars(arguments).items():
        if name != "prompts" and (value == [] or isinstance(value, list) and [] in value):
            # what argparse makes of --name=--
            raise UsageError(f"--{name.replace('_', '-')}: '--' is no value; accepted: see --help")
    for name in ("stop", "system"):
        texts = getattr(arguments, name, None) or ()
        for text in (texts,) if isinstance(texts, str) else texts:
            refuse_surrogates(f"--{name}", text)
    if arguments.module == "generate":
        _check_generate(arguments)
    elif arguments.module == "info" and arguments.river is not None and not _names_a_model(arguments):
        raise UsageError("--river needs a model's directory or --demo, the model that it belongs to")
    elif arguments.module == "convert":
        _check_convert(arguments)
    elif arguments.module == "evaluate":
        _check_eval(arguments)
    elif arguments.module == "calibrate" and not (arguments.prompts or arguments.demo):
        raise UsageError("what to calibrate on; accepted: --prompts FILE, or --demo for the bundled model")
    elif arguments.module == "bench":
        _check_bench(arguments)
    return arguments


def _refuse_unknown_options(parser: argparse.ArgumentParser, texts: list[str]) -> None:
    """Before argparse, which would first miss a required option that was misspelt."""
    options = parser._option_string_actions
    for text in texts[: texts.index("--") if "--" in texts else None]:
        name = text.partition("=")[0]
        if name.startswith("--") and " " not in name and name not in options:
            parser.error(f"unrecognized arguments: {name[:80]}{did_you_mean(name, options)}")


def _take_rest(parser: argparse.ArgumentParser, arguments, rest: list[str]) -> None:
    """What argparse leaves over: the prompts that come after an option, or too much."""
    takes = arguments.module == "generate"
    end = rest.index("--") if "--" in rest else len(rest)
    dashed = [text for text in rest[:end] if text[:1] == "-" != text and " " not in text]
    if refused := dashed if takes else rest:
        parser.error(f"unrecognized arguments: {' '.join(refused)}")
    if takes:
        arguments.prompts += rest[:end] + rest[end + 1 :]


def _take_directory(arguments) -> None:
    """The model's directory may do without --model. Before prompts it is the first text.

    With --model or --demo every text is a prompt, even one that names a directory.
    """
    if arguments.module != "generate":
        arguments.model = arguments.model if arguments.directory is None else arguments.directory
    elif arguments.prompts and not _names_a_model(arguments):
        directory = arguments.prompts.pop(0)
        if not os.path.isdir(directory) and not _may_be_on_a_hub(directory):
            raise UsageError(
                f"no model: {directory[:80]!r} is no directory; accepted: a model's directory before the "
                "prompts, or --model DIR, or --demo for the bundled one"
            )
        arguments.model = directory


def _may_be_on_a_hub(name: str) -> bool:
    """OWNER/NAME, as models are named elsewhere: who loads it says how to download it."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not os.path.lexists(name)


def _check_generate(arguments) -> None:
    if not (arguments.prompts or arguments.file or arguments.demo):
        raise UsageError("no prompt; accepted: prompts, - for standard input, --file, or --demo")
    if not _names_a_model(arguments):
        raise UsageError("no model; accepted: its directory, or --demo for the bundled one")
    if arguments.chat and not (arguments.prompts or arguments.file):
        raise UsageError("--chat without a prompt; accepted: prompts, - for standard input, or --file")
    arguments.prompts = read_prompts(arguments.prompts, arguments.file or [])


def _check_convert(arguments) -> None:
    """Refuses options that say how to quantise where nothing is quantised."""
    options = {
        "--river-from": arguments.river_from,
        "--group-size": arguments.group_size,
        "--calibrate": arguments.calibrate,
    }
    given = [name for name, value in options.items() if value is not None]
    of_rivers = [*given, *["--force"] * arguments.force, *["--device"] * (arguments.device != "auto")]
    if (arguments.model or "").lower().endswith(".gguf") and of_rivers:
        raise UsageError(f"{of_rivers[0]} with a GGUF file, of which a checkpoint is made; accepted: --dtype")
    if given[:1] == ["--river-from"] and given[1:]:
        raise UsageError(f"{given[1]} with --river-from, whose weights are quantised; accepted: one of them")


def _check_eval(arguments) -> None:
    if arguments.tasks:
        if name := _first_given(arguments, DEMO_OPTIONS):
            raise UsageError(f"{name} with --tasks, which has documents of its own; accepted: one of them")
        if not _names_a_model(arguments):
            raise UsageError("no model; accepted: its directory, or --demo for the bundled one")
        return
    if name := _first_given(arguments, TASK_OPTIONS):
        raise UsageError(f"{name} needs --tasks, which it belongs to")
    if not arguments.demo:
        raise UsageError(
            "what to evaluate on; accepted: --demo (with a model's directory: that model on its tasks), "
            "or --tasks with a model's directory"
        )
    for name, default in DEMO_OPTIONS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)


def _first_given(arguments, names: Iterable[str]) -> str | None:
    """The first of these options that the command line has."""
    values = {name: getattr(arguments, name) for name in names}
    given = [name for name, value in values.items() if value is not None and value is not False]
    return f"--{given[0].replace('_', '-')}" if given else None


def _check_bench(arguments) -> None:
    if arguments.chat and arguments.prompt_tokens is not None:
        raise UsageError("--chat with --prompt-tokens, which are random ids; accepted: one of them")
    arguments.prompts = read_prompts([], arguments.file or [])


def _names_a_model(arguments) -> bool:
    return arguments.demo or arguments.model is not None
