"""The command `river`. Results go to standard output, progress and notes to standard error.

Exit code 0 is success, 2 bad input with one line `river: error: ...`, 130 an interrupt. With --json standard
output holds one JSON document and nothing else.
"""

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from unicodedata import category

from . import __version__
from .errors import RiverError

# What a command needs is imported when it runs, so that --help and errors come fast.

DEMO_PROBLEMS, DEMO_FUNCTIONS = 4, 2  # what `river generate --demo` shows


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

    generate = command("generate", _generate, "continue prompts through the exit river")
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

    info = command("info", _info, "show this installation, and the facts of a model")
    _add_model(info, "the bundled model", device=False)

    convert = command("convert", _convert, "build the 4-bit river of a model and save it")
    _add_model(convert, "the bundled model", required=True, river=False)
    convert.add_argument("--output", required=True, metavar="DIR", help="the river's new directory")
    convert.add_argument(
        "--group-size", type=int, choices=(64, 128), default=64, help="columns that share a scale (64)"
    )
    convert.add_argument("--force", action="store_true", help="replace a river that is there already")

    evaluate = command("eval", _eval, "measure quality and speed against full depth")
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


# --- generate -------------------------------------------------------------------------------------------


def _generate(arguments) -> None:
    from .request import Options

    names = {field.name for field in fields(Options)}
    options = {name: v for name, v in vars(arguments).items() if name in names and v is not None}
    prompts = _prompts(arguments)
    if not prompts and not arguments.demo:
        raise RiverError("no prompt; accepted: 1 to 8 prompts, - for standard input, --file, or --demo")
    if not arguments.demo and arguments.model is None:
        raise RiverError("no model; accepted: --model DIR, or --demo for the bundled one")
    _check_request(arguments, prompts or ["demo"], options)
    model = _load(arguments)
    if not prompts:
        _show_demo(arguments, model, options)
    elif arguments.compare:
        _generate_and_compare(arguments, model, prompts, options)
    elif arguments.json or len(prompts) > 1 or not sys.stdout.isatty():
        outputs = model.generate(prompts, **options)
        if arguments.json:
            _print_json({**_model_facts(model), "options": options, "outputs": _outputs(prompts, outputs)})
            return
        _print_texts(prompts, outputs)
        _note(_summary(model, outputs))
    else:
        stream = model.stream(prompts[0], **options)
        for piece in stream:
            print(_printable(piece.text), end="", flush=True)
        print()
        _note(_summary(model, [stream.output]))


def _prompts(arguments) -> list[str]:
    """Texts of files and of standard input lose the newline at their end."""
    prompts = []
    for prompt in arguments.prompts:
        prompts.append(_text("standard input", sys.stdin.buffer.read()) if prompt == "-" else prompt)
    for name in arguments.file or ():
        prompts.append(_text(name, Path(name).read_bytes()))
    return prompts


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RiverError(f"{name}: byte {error.start} is no UTF-8; accepted: UTF-8 text") from None


def _check_request(arguments, prompts: list[str], options: dict) -> None:
    """Refuses what can be refused before the weights are loaded."""
    from .config import read_config
    from .model import DEMO
    from .request import Options, integer, plan, strings

    for prompt in prompts:
        if not prompt:
            raise RiverError("the prompt is empty; accepted: at least one token")
        if any("\ud800" <= c <= "\udfff" for c in prompt):  # what Python makes of such an argument
            raise RiverError(f"prompt {prompt[:40]!r} is no UTF-8; accepted: UTF-8 text")
    strings("--stop", options.get("stop", ()))
    if _compares(arguments) and options.get("mode", "river") != "river":
        raise RiverError(f"mode={options['mode']!r}; accepted: 'river', the comparison runs the others too")
    config = read_config(arguments.model or DEMO)
    integer("max_new_tokens", options.get("max_new_tokens", 1), 1, config.max_length - 1)
    plan(config, None, [[0]] * len(prompts), replace(Options(**options), max_new_tokens=1, stop=()))


def _compares(arguments) -> bool:
    """Whether full depth and full W4 run beside the river; the demo always compares."""
    return arguments.compare or not (arguments.prompts or arguments.file)


def _outputs(prompts: Sequence[str], outputs: Sequence) -> list[dict]:
    """For JSON."""
    return [
        {"prompt": prompt}
        | {name: value for name, value in vars(output).items() if name not in ("logits", "stats")}
        | {"stats": asdict(output.stats)}
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def _print_texts(prompts: Sequence[str], outputs: Sequence) -> None:
    """One text alone is printed as it is; several have a line before each that says which one it is."""
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), start=1):
        if len(prompts) > 1:
            print(f"--- {number}: {_printable(' '.join(prompt.split())[:80])}")
        print(_printable(output.text))


def _summary(model, outputs: Sequence) -> str:
    depths = [depth for output in outputs for depth in output.exit_depths]
    mean = sum(depths) / len(depths)
    return (
        f"{len(depths)} new tokens, mean exit depth {mean:.2f} of {model.config.num_hidden_layers} layers; "
        "--compare shows speed and agreement with full depth"
    )


def _generate_and_compare(arguments, model, prompts: list[str], options: dict) -> None:
    from .evaluate import Item, evaluate

    settings, common = _three_settings(model, options)
    shown = []
    rows = evaluate(
        model,
        [[Item(prompt) for prompt in prompts]],
        settings,
        divergence=False,
        on_batch=lambda batch, outputs: shown.extend(outputs[-1]),
        **common,
    )
    if arguments.json:
        _print_json({**_model_facts(model), "options": options, "outputs": _outputs(prompts, shown),
                     "rows": [row.as_dict() for row in rows]})  # fmt: skip
        return
    _print_texts(prompts, shown)
    _print_comparison(model, rows, shown)
    print(f"Together, at batch {len(prompts)}, on {_machine(model)}.")


def _three_settings(model, options: dict) -> tuple[list, dict]:
    """Full depth, full W4 and River, and the options that they have in common."""
    from .evaluate import settings_of
    from .request import Options

    own = {name: options[name] for name in ("min_layers", "prefill") if name in options}
    threshold = options.get("threshold", Options.threshold)
    common = {name: v for name, v in options.items() if name not in ("mode", "threshold", *own)}
    return settings_of(model, [threshold], **own), common


def _show_demo(arguments, model, options: dict) -> None:
    """Held-out prompts through the river, then what that costs and gains."""
    from .evaluate import DEMO_NEW_TOKENS, demo_items, evaluate

    seed = options.get("seed", 0)
    items = demo_items(DEMO_PROBLEMS, DEMO_FUNCTIONS, seed)
    settings, common = _three_settings(model, {"max_new_tokens": DEMO_NEW_TOKENS} | options)
    river = settings[-1]
    shown = []

    def show(batch, outputs):
        (item,), (output,) = batch, outputs[-1]
        shown.append(output)
        if not arguments.json:
            _print_demo_item(item, output.text)

    if not arguments.json:
        print(f"{_model_line(model)}\n{river.name}, on prompts that are not in its training data:\n")
    rows = evaluate(model, [[item] for item in items], settings, divergence=False, on_batch=show, **common)
    if arguments.json:
        _print_json({**_model_facts(model), "options": options,
                     "outputs": _outputs([item.prompt for item in items], shown),
                     "rows": [row.as_dict() for row in rows]})  # fmt: skip
        return
    _print_comparison(model, rows, shown)
    print(
        f"One prompt at a time on {_machine(model)}; tokens/s is decoding alone, the median of the prompts.\n"
        "A model as small as this one says little about the speed of large ones: see bench/."
    )


def _print_demo_item(item, text: str) -> None:
    from rich.text import Text

    right = item.is_right(text)
    mark = ("  right", "bold green") if right else ("  wrong", "bold red")
    line = Text.assemble((item.prompt, "dim"), _printable(text).rstrip(), mark)
    _console().print(line, soft_wrap=not sys.stdout.isatty())
    print()


def _print_comparison(model, rows: Sequence, outputs: Sequence) -> None:
    """The table of the three settings, the river's exit depths, and its agreement with full depth."""
    from .evaluate import result_table

    river = rows[-1]
    _print_table(result_table(rows))
    print(f"\nExit depths of {river.name}, {river.new_tokens} tokens:")
    print("\n".join(_histogram(outputs)))
    tokens, exited = river.equal_tokens, river.equal_exited_tokens
    early = f";\nof the {exited.total} that exited early, {exited.count} are" if exited else ""
    print(f"\n{tokens.count} of {tokens.total} tokens are what full depth has at the same place{early}.\n")


def _histogram(outputs: Sequence) -> list[str]:
    """Text bars of how many tokens had which exit depth; first tokens have the prefill's depth."""
    counts = Counter(depth for output in outputs for depth in output.exit_depths[1:])
    first = Counter(output.exit_depths[0] for output in outputs)
    longest = max((counts + first).values())
    bar = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    lines = []
    for depth in sorted(counts | first):
        count = counts[depth] + first[depth]
        prompts = f"  ({first[depth]} by the prefill)" if first[depth] else ""
        lines.append(f"  {depth:3}  {bar * math.ceil(40 * count / longest)} {count}{prompts}")
    return lines


# --- info -----------------------------------------------------------------------------------------------


def _info(arguments) -> None:
    import torch

    from . import ops

    build = ops._C.build_info()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "version": __version__,
        "build": build,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }
    torch_cuda = f"has CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU build"
    reason = build.get("cuda_note") or f"built without them; torch {torch_cuda}"
    lines = {
        "river_ext": __version__ + ("" if build["version"] == __version__ else f", ops {build['version']}"),
        "CUDA kernels": f"for {build['cuda_archs']}" if build["cuda"] else f"none ({reason})",
        "CPU kernels": f"{build['cpu_isa']}, {_threads()}",
        "torch": torch.__version__,
        "GPU": ", ".join(gpus) or "none",
    }
    if arguments.demo or arguments.model is not None:
        model_facts, model_lines = _checkpoint_facts(arguments)
        facts["model"] = model_facts
        lines |= model_lines
    elif arguments.river is not None:
        raise RiverError("--river needs --model DIR or --demo, the model that it belongs to")
    if arguments.json:
        _print_json(facts)
        return
    width = max(map(len, lines)) + 2
    for name, value in lines.items():
        print(f"{name:{width}}{_printable(str(value))}")


def _checkpoint_facts(arguments) -> tuple[dict, dict]:
    """The facts of a model for JSON and as lines; its weights are mapped, not read."""
    from .checkpoint import load_checkpoint
    from .model import DEMO
    from .ops import packed_shape
    from .river import load_river, read_facts
    from .w4 import BlockShape

    checkpoint = load_checkpoint(arguments.model or DEMO, check_finite=False)
    config, weights, shape = checkpoint.config, checkpoint.weights, BlockShape.of(checkpoint.config)
    around = [weights.embed_tokens, weights.norm]
    if weights.lm_head is not weights.embed_tokens:
        around.append(weights.lm_head)
    sizes = {
        "backbone": sum(t.nbytes for block in weights.layers for t in vars(block).values() if t is not None),
        "embedding_and_head": sum(t.nbytes for t in around),
        "river": len(weights.layers)
        * sum(math.prod(packed_shape(*size)) for size in shape.packed().values()),
    }
    layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
    kv_bytes = 2 * layers * kv_heads * config.head_dim * config.dtype.itemsize
    padding = {name: list(pad) for name, pad in shape.padding().items()}
    facts = {
        "directory": str(checkpoint.directory),
        "fingerprint": checkpoint.fingerprint,
        "config": asdict(config) | {"dtype": _dtype_name(config)},
        "max_length": config.max_length,
        "tokenizer": checkpoint.tokenizer is not None,
        "bytes": sizes,
        "kv_bytes_per_token": kv_bytes,
        "padding": padding,
    }
    heads = f"{config.num_attention_heads} query and {kv_heads} KV heads of {config.head_dim}"
    rope = (config.rope_scaling or {}).get("rope_type", "default")
    tied = "tied" if config.tie_word_embeddings else "own"
    lines = {
        "model": str(checkpoint.directory),
        "fingerprint": checkpoint.fingerprint,
        "architecture": f"{config.model_type}, {layers} layers, hidden {config.hidden_size}, {heads}, "
        f"inner {config.intermediate_size}",
        "vocabulary": f"{config.vocab_size}, {tied} head, "
        + ("tokenizer.json" if checkpoint.tokenizer else "no tokenizer.json: token ids only"),
        "positions": f"{config.max_length}, rope {rope}, theta {config.rope_theta:g}",
        "weights": f"{_dtype_name(config)}: backbone {_size(sizes['backbone'])}, "
        f"embedding and head {_size(sizes['embedding_and_head'])}",
        "river": f"{_size(sizes['river'])}, "
        f"{sizes['river'] / sizes['backbone']:.0%} of the backbone's layers",
        "river's padding": ", ".join(
            f"{name} {rows} rows and {columns} columns"
            for name, (rows, columns) in padding.items()
            if rows or columns
        )
        or "none",
        "KV cache": f"{_size(kv_bytes)} a token",
    }
    if arguments.river is not None:
        load_river(arguments.river, config, checkpoint.fingerprint)  # refuses one of another model
        saved = read_facts(arguments.river)
        facts["river"] = {"directory": str(arguments.river)} | saved
        lines["saved river"] = f"{arguments.river}: {saved['quantiser']}, groups of {saved['group_size']}"
    return facts, lines


# --- convert --------------------------------------------------------------------------------------------


def _convert(arguments) -> None:
    from .checkpoint import load_checkpoint
    from .evaluate import quantisation_errors
    from .model import DEMO, choose_device
    from .river import build_river, save_river

    output = Path(arguments.output)
    _check_output(output, arguments.force)
    checkpoint = load_checkpoint(arguments.model or DEMO, arguments.dtype, choose_device(arguments.device))
    config, weights = checkpoint.config, checkpoint.weights
    start = time.perf_counter()
    river = build_river(config, weights, arguments.group_size, progress=not arguments.json)
    seconds = time.perf_counter() - start
    errors = quantisation_errors(config, weights, river)
    save_river(output, river, config, checkpoint.fingerprint)
    size = sum(file.stat().st_size for file in output.iterdir())
    if arguments.json:
        _print_json(
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
    print(f"{output}: {len(river)} exit layers, {_size(size)}, quantised in {seconds:.1f} s")
    print("mean squared error, in parts of the weights' mean square:")
    for name, error in errors.items():
        print(f"  {name:10}  {error:.5f}")


def _check_output(output: Path, force: bool) -> None:
    """Refuses an output before the work: save_river would do so after it."""
    if os.path.lexists(output) and not force and not (output.is_dir() and not any(output.iterdir())):
        raise RiverError(f"{output}: exists; accepted: a new directory, or --force to replace a saved river")
    parent = next(parent for parent in output.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RiverError(f"{output}: cannot be written, {parent} is no directory that can be written to")


# --- eval -----------------------------------------------------------------------------------------------


def _eval(arguments) -> None:
    from .config import read_config
    from .evaluate import DEMO_NEW_TOKENS, demo_items, evaluate, result_table, settings_of
    from .model import DEMO
    from .request import integer

    if not arguments.demo:
        raise RiverError(
            "what to evaluate on; accepted: --demo (with --model DIR: another model on its tasks)"
        )
    problems = integer("--problems", arguments.problems, 0, 10_000)
    functions = integer("--functions", arguments.functions, 0, 10_000)
    if problems + functions == 0:
        raise RiverError("--problems 0 --functions 0; accepted: at least one of them above 0")
    thresholds = _thresholds(arguments.thresholds)
    read_config(arguments.model or DEMO)
    model = _load(arguments)
    items = demo_items(problems, functions, arguments.seed)
    settings = settings_of(model, thresholds)
    start = time.perf_counter()
    with _progress_bar("evaluating", len(items)) as advance:
        rows = evaluate(
            model,
            [[item] for item in items],
            settings,
            max_new_tokens=DEMO_NEW_TOKENS,
            on_batch=lambda batch, outputs: advance(),
        )
    seconds = time.perf_counter() - start
    if arguments.json:
        _print_json({**_model_facts(model), "problems": problems, "functions": functions,
                     "seed": arguments.seed, "batch": 1, "max_new_tokens": DEMO_NEW_TOKENS,
                     "seconds": seconds, "rows": [row.as_dict() for row in rows]})  # fmt: skip
        return
    print(f"{_model_line(model)}\n{problems} problems, {functions} functions (seed {arguments.seed})\n")
    _print_table(result_table(rows))
    full = rows[0].name
    print(
        f"\nGreedy, one prompt at a time on {_machine(model)}, {seconds:.0f} s in all.\n"
        "problems, functions: right ones, with the standard error. same output: token sequences that equal\n"
        f"{full}'s. KL: mean KL({full} || row) of the next token, along {full}'s sequences.\n"
        "exit depth: mean over the new tokens. tokens/s: decoding alone, the median of the prompts."
    )


def _thresholds(text: str | None) -> Sequence[float]:
    from .evaluate import DEMO_THRESHOLDS
    from .request import number

    if text is None:
        return DEMO_THRESHOLDS
    try:
        return [number("--thresholds", float(part)) for part in text.split(",")]
    except ValueError:
        raise RiverError(f"--thresholds {text!r}; accepted: numbers, not NaN, with commas between") from None


# --- what commands share --------------------------------------------------------------------------------


def _load(arguments):
    from .model import load

    return load(arguments.model, arguments.device, arguments.dtype, arguments.river)


def _model_facts(model) -> dict:
    """What a measurement was made with, for JSON."""
    import torch

    from . import ops

    build = ops._C.build_info()
    return {
        "version": __version__,
        "model": str(model.directory),
        "fingerprint": model.fingerprint,
        "num_hidden_layers": model.config.num_hidden_layers,
        "dtype": _dtype_name(model.config),
        "device": _device_name(model),
        "cpu_isa": build["cpu_isa"],
        "threads": torch.get_num_threads(),
    }


def _model_line(model) -> str:
    from .model import DEMO

    name = "the bundled demo model" if model.directory == DEMO else _printable(str(model.directory))
    config = model.config
    return f"river {__version__}, {name}: {config.num_hidden_layers} layers, hidden {config.hidden_size}"


def _machine(model) -> str:
    from . import ops

    if model.network.device.type == "cuda":
        return _device_name(model)
    return f"the CPU ({ops._C.build_info()['cpu_isa']}, {_threads()})"


def _threads() -> str:
    import torch

    count = torch.get_num_threads()
    return "1 thread" if count == 1 else f"{count} threads"


def _device_name(model) -> str:
    import torch

    device = model.network.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _dtype_name(config) -> str:
    return str(config.dtype).removeprefix("torch.")


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _print_json(document: dict) -> None:
    print(json.dumps(_finite(document), allow_nan=False))


def _finite(value):
    """JSON has no infinities: they become text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _printable(text: str) -> str:
    """Text of a model or a file, on a terminal without the control characters that would steer it."""
    if not sys.stdout.isatty():
        return text
    return "".join("\ufffd" if category(c) == "Cc" and c not in "\n\t" else c for c in text)


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _console():
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


def _print_table(table) -> None:
    console = _console()
    if not console.is_terminal:
        console.width = 200  # a file has no edge to wrap at
    console.print(table)


@contextmanager
def _progress_bar(label: str, total: int) -> Iterator[Callable[[], None]]:
    """Yields what to call after each step; the bar shows on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    progress = Progress(
        *columns, console=console, transient=True, refresh_per_second=2, disable=not console.is_terminal
    )
    with progress:
        task = progress.add_task(label, total=total)
        yield lambda: progress.advance(task)


if __name__ == "__main__":
    sys.exit(main())
