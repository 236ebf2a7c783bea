"""The arguments of every command, and what can be refused by them alone."""

import argparse
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence

from .errors import UsageError, did_you_mean
from .option_groups import add_batch, add_calibrate, add_calibrated_file, add_serving, add_tasks
from .prompts import read_prompts, refuse_surrogates
from .values import count_or_auto, given, threads, threshold

KV_STRATEGIES = "share (default, the river's), mask, recompute, propagate or monotone"

TASK_OPTIONS = ("data", "limit", "max_gen_toks", "chat", "run_code", "score_by_steps")  # of `eval --tasks`
DEMO_OPTIONS = {"problems": 300, "functions": 100, "seed": 0}  # of `eval` without it, and their defaults


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """`module` of the result runs the command; prompts and files have become `prompts`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _parser()
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


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser of all, and those of the commands by name."""
    parser = _Parser(
        prog="river",
        description="Training-free, token-level early exit for unmodified Hugging Face language models.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, module: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(module=module, threads=None)
        added.add_argument("--json", action="store_true", help="print one JSON document")
        return added

    generate = command("generate", "generate", "continue prompts through the exit river")
    _add_model(generate, "the bundled model; without a prompt it shows what River does", directory=False)
    _add_river(generate, "a saved river; without it one is built, for minutes if the model is large")
    _add_machine(generate)
    _add_offloading(generate)
    _add_prompts(generate)
    generate.add_argument(
        "--compare", action="store_true", help="also run full depth, lossless and full W4, and print a table"
    )
    generate.add_argument(
        "--trace",
        type=given,
        metavar="FILE",
        help="write each token's exit depth: .html to look at, or .json",
    )
    _add_options(generate)

    chat = command("chat", "chat", "talk with a model; the turns before stay in the cache")
    _add_model(chat, "the bundled model, which has no chat template", required=True)
    _add_river(chat, "a saved river; without it one is built")
    _add_machine(chat)
    _add_offloading(chat)
    chat.add_argument("--system", type=given, metavar="TEXT", help="what the model is told first")
    _add_options(chat)

    serve = command("serve", "serve", "serve a model over HTTP, by OpenAI's API, with a page to talk with it")
    _add_model(serve, "the bundled model, which has no chat template", required=True)
    _add_river(serve, "a saved river; without it one is built")
    _add_machine(serve)
    add_serving(serve)

    batch = command("batch", "batch", "answer a file of prompts, by several processes or machines")
    _add_model(batch, "the bundled model", required=True)
    _add_river(batch, "a saved river; without it each replica builds one")
    _add_machine(batch)
    add_batch(batch)
    _add_options(batch, engine=False)

    info = command("info", "info", "show what this installation was built with, and the facts of a model")
    _add_model(info, "the bundled model")
    _add_river(info, "a saved river of that model, whose facts are shown too")

    convert = command(
        "convert", "convert", "build the 4-bit river of a model and save it, or make a model of a GGUF file"
    )
    _add_model(convert, "the bundled model", required=True)
    _add_machine(convert)
    convert.add_argument("-o", "--output", type=given, required=True, metavar="DIR", help="the new directory")
    convert.add_argument("--group-size", type=int, choices=(64, 128), help="columns that share a scale (64)")
    convert.add_argument(
        "--river-from",
        type=given,
        metavar="PATH",
        help="take the 4-bit weights of the same model in the format AWQ, GPTQ, compressed-tensors or GGUF",
    )
    convert.add_argument(
        "--calibrate",
        type=given,
        metavar="FILE",
        help="refine it with texts: blank lines between, or .jsonl with a field text; takes minutes",
    )
    convert.add_argument("--force", action="store_true", help="replace a river that is there already")

    evaluate = command("eval", "evaluate", "measure quality and speed against full depth")
    _add_model(evaluate, "the bundled model's held-out problems and functions", exclusive=False)
    _add_river(evaluate, "a saved river; without it one is built")
    _add_machine(evaluate)
    _add_offloading(evaluate)
    evaluate.add_argument("--problems", type=int, metavar="N", help="word problems (300)")
    evaluate.add_argument("--functions", type=int, metavar="N", help="functions (100)")
    evaluate.add_argument("--thresholds", metavar="S,S,...", help="of the River rows")
    evaluate.add_argument("--kv-strategy", help=f"of these rows: {KV_STRATEGIES}")
    evaluate.add_argument("--seed", type=int, help="which held-out items (0)")
    add_tasks(evaluate)

    calibrate = command("calibrate", "calibrate", "choose a threshold for a target, on prompts of your own")
    _add_model(calibrate, "the bundled model; without --prompts on its held-out problems", required=True)
    _add_river(calibrate, "a saved river; without it one is built")
    _add_machine(calibrate)
    add_calibrate(calibrate)

    bench = command("bench", "bench", "measure the speed of full depth, lossless, full W4 and River in turns")
    _add_model(bench, "the bundled model", required=True)
    _add_river(bench, "a saved river; without it one is built, for minutes if the model is large")
    _add_machine(bench)
    bench.set_defaults(resident_layers=None)
    prompts = bench.add_mutually_exclusive_group()
    _add_file(prompts)
    prompts.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="a prompt of so many random token ids"
    )
    _add_chat(bench)
    bench.add_argument("--new-tokens", type=int, default=64, metavar="N", help="at most, of each prompt (64)")
    bench.add_argument("--turns", type=int, default=5, metavar="N", help="of all settings (5)")
    bench.add_argument("--thresholds", metavar="S,S,...", help="of the River rows (0.5)")
    bench.add_argument("--min-layers", type=int, metavar="N", help="of these, before an exit (1)")
    bench.add_argument("--river-head", help="of full W4 and River: model (default) or w4")
    return parser, commands.choices


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="any number of them; - is standard input. Without --model and --demo the first is the model's "
        "directory: river generate DIR PROMPT",
    )
    _add_file(parser)
    _add_chat(parser)


def _add_file(parser) -> None:
    parser.add_argument(
        "--file",
        action="append",
        type=given,
        metavar="FILE",
        help="a file that holds a prompt; not of it: its last newline, \\r before \\n, a byte order mark",
    )


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chat",
        action="store_true",
        help="a prompt is what a user says, and goes through the model's chat template",
    )


def _add_options(parser: argparse.ArgumentParser, engine: bool = True) -> None:
    """Of generation: what is not given is as `Options` has it. engine: also those of an engine."""
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default 256")
    parser.add_argument(
        "--threshold",
        type=threshold,
        metavar="S",
        help="exit above this similarity (0.5), or calibrated",
    )
    add_calibrated_file(parser)
    parser.add_argument("--min-layers", type=int, metavar="N", help="backbone layers before an exit (1)")
    parser.add_argument("--prefill", metavar="POLICY", help="full (default), depth:K, min or last")
    parser.add_argument("--mode", help="river (default), lossless, full or full_w4")
    parser.add_argument(
        "--draft-tokens",
        type=count_or_auto,
        metavar="K",
        help="of lossless mode: 1 to 7, auto (default) or calibrated",
    )
    parser.add_argument("--river-head", help="of the modes river and full_w4: model (default) or w4")
    parser.add_argument("--kv-strategy", help=KV_STRATEGIES)
    parser.add_argument("--temperature", type=float, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest; 0 is all")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest; 1 is all")
    parser.add_argument("--min-p", type=float, metavar="P", help="draw above P x the best chance; 0 is all")
    parser.add_argument("--seed", type=int, help="of sampling, and of the demo's prompts (0)")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text")
    if engine:
        parser.add_argument("--batch-policy", help="of several prompts: row (default) or min")
        parser.add_argument("--exit-control", help="where exits are decided: auto (default), host or device")


def _add_model(
    parser: argparse.ArgumentParser,
    demo: str,
    required: bool = False,
    directory: bool = True,
    exclusive: bool = True,
) -> None:
    group = parser.add_mutually_exclusive_group(required=required)
    if directory:
        group.add_argument("directory", nargs="?", type=given, metavar="DIR", help="the same as --model DIR")
    group.add_argument("--model", type=given, metavar="DIR", help="a Hugging Face checkpoint directory")
    (group if exclusive else parser).add_argument("--demo", action="store_true", help=demo)


def _add_river(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--river", type=given, metavar="DIR", help=text)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=given, default="auto", help="cpu, cuda or auto (default)")
    parser.add_argument(
        "--dtype",
        type=given,
        default="auto",
        help="bfloat16, float16, float32; auto (default): the model's own",
    )
    parser.add_argument(
        "--threads",
        type=threads,
        metavar="N",
        help="of the CPU; default: all cores. Fewer may be faster where others use them",
    )


def _add_offloading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resident-layers", type=int, metavar="K", help="offload the backbone layers after the first K"
    )
    parser.add_argument(
        "--deep-tokens", help="what wants to run an offloaded layer: stream (default) it in, or exit before"
    )
