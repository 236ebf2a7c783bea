"""Options that belong together: those that several commands share, then those of one command alone."""

import argparse

from .values import count, count_or_auto, given, share, threads, threshold

KV_STRATEGIES = "share (default, the river's), mask, recompute, propagate or monotone"


def add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="any number of them; - is standard input. Without --model and --demo the first is the model's "
        "directory: river generate DIR PROMPT",
    )
    add_file(parser)
    add_chat(parser)


def add_file(parser) -> None:
    parser.add_argument(
        "--file",
        action="append",
        type=given,
        metavar="FILE",
        help="a file that holds a prompt; not of it: its last newline, \\r before \\n, a byte order mark",
    )


def add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chat",
        action="store_true",
        help="a prompt is what a user says, and goes through the model's chat template",
    )


def add_options(
    parser: argparse.ArgumentParser,
    engine: bool = True,
    modes: str = "river (default), lossless, full or full_w4",
) -> None:
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
    parser.add_argument("--mode", help=modes)
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


def add_model(
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


def add_river(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--river", type=given, metavar="DIR", help=text)


def add_machine(parser: argparse.ArgumentParser) -> None:
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


def add_offloading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resident-layers", type=int, metavar="K", help="offload the backbone layers after the first K"
    )
    parser.add_argument(
        "--deep-tokens", help="what wants to run an offloaded layer: stream (default) it in, or exit before"
    )


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(resident_layers=None)
    parser.add_argument(
        "--prompts",
        type=given,
        metavar="FILE",
        help="blank lines between, or .jsonl with a field prompt, question or text",
    )
    parser.add_argument(
        "--count", type=count, metavar="N", help="prompts of the file (all), or problems (60)"
    )
    parser.add_argument("--chat", action="store_true", help="a prompt is what a user says")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of an answer (64)")
    parser.add_argument("--thresholds", metavar="S,S,...", help="to choose from: 0.5 to 0.999")
    parser.add_argument(
        "--per-layer",
        action="store_true",
        help="choose among thresholds by layer, too, which are learnt from every second prompt",
    )
    parser.add_argument(
        "--max-disagreement",
        type=share,
        metavar="SHARE",
        help="of tokens that may be others than full depth's (1%%, if no target is given)",
    )
    parser.add_argument("--min-speedup", type=float, metavar="X", help="over full depth")
    parser.add_argument(
        "--by-bytes", action="store_true", help="judge speed by the weights that are read, not by the clock"
    )
    parser.add_argument(
        "--guarantee",
        type=share,
        metavar="SHARE",
        help="promise that no more of later answers differ from full depth's",
    )
    parser.add_argument(
        "--confidence", type=share, default=0.95, metavar="SHARE", help="of that promise (95%%)"
    )
    parser.add_argument(
        "--timed", type=int, default=4, metavar="N", help="prompts that speed is measured on (4)"
    )
    parser.add_argument("--min-layers", type=int, metavar="N", help="as in generate, and so is the next")
    parser.add_argument("--river-head", help="model (default) or w4")
    parser.add_argument("-o", "--output", type=given, metavar="FILE", help="where the choice is written")


def add_calibrated_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibrated",
        type=given,
        metavar="FILE",
        help="what river calibrate wrote: the threshold, unless another is given",
    )


def add_tasks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("published tasks")
    group.add_argument(
        "--tasks",
        type=given,
        metavar="NAME,NAME,...",
        help="gsm8k, humaneval and humaneval_instruct with --data; others, groups and tags too, by "
        "lm-evaluation-harness (pip install 'river_ext[eval]'), which without --data "
        "loads datasets from the network",
    )
    group.add_argument(
        "--data", type=given, metavar="DIR", help="documents, <task>/<split>.jsonl; nothing is downloaded"
    )
    group.add_argument("--limit", type=int, metavar="N", help="only the first documents of each task")
    group.add_argument("--max-gen-toks", type=int, metavar="N", help="new tokens (the task's, or 256)")
    group.add_argument("--chat", action="store_true", help="prompts go through the model's chat template")
    group.add_argument(
        "--run-code", action="store_true", help="of humaneval: run what the model writes, in a sandbox"
    )
    group.add_argument(
        "--score-by-steps",
        action="store_true",
        help="log-likelihoods token by token through the decoding path, so that tokens exit",
    )


def add_batch(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.set_defaults(resident_layers=None)
    add(
        "--prompts",
        type=given,
        required=True,
        metavar="FILE",
        help="JSON lines: prompt (text or token ids) or messages, own options; other fields are kept",
    )
    add("-o", "--output", type=given, required=True, metavar="FILE", help="where the answers go, in order")
    there = parser.add_mutually_exclusive_group()
    there.add_argument("--resume", action="store_true", help="go on with answers that are there")
    there.add_argument("--force", action="store_true", help="replace them")
    add("--replicas", type=count, default=1, metavar="N", help="processes with the model (1)")
    add("--slots", type=int, default=8, metavar="N", help="prompts that run at once in each, 1 to 8 (8)")
    add("--max-len", type=int, metavar="N", help="positions of a slot; the model's, up to 4096")
    add("--address", type=given, help="of a Ray cluster; none: RAY_ADDRESS, or else this machine alone")


def add_serving(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", type=given, default="127.0.0.1", help="address to listen at (127.0.0.1)")
    add("--port", type=int, default=8000, metavar="N", help="8000; 0 is any free one, which it prints")
    add("--mode", default="lossless", help="where a request names none: lossless (default), river or full")
    add("--threshold", type=threshold, metavar="S", help="of mode river, where none is named (0.5)")
    add_calibrated_file(parser)
    add("--slots", type=int, default=8, metavar="N", help="requests that run at once, 1 to 8 (8)")
    add("--max-len", type=int, metavar="N", help="positions of a slot; the model's, up to 4096")
    add("--queue", type=int, default=64, metavar="N", help="requests that may wait (64); more get code 429")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds that a request may take (600)")
    add(
        "--reuse-prompts",
        action="store_true",
        help="take over of earlier prompts also what the river wrote: tokens may then depend on them",
    )
    parser.set_defaults(resident_layers=None)
