"""The arguments of `river calibrate`, beside those that say which model."""

import argparse

from .values import count, given, share


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
