"""Lossless decoding on the CPU against full bf16, full W4 and river, in one interleaved run.

With --model, on that checkpoint: every prompt of each file (--prompts: JSON lines with a field "question",
"prompt" or "text") through every setting in turn, batch 1, greedy. x is the speed over full bf16, the median
of the prompts; `same` is the share of prompts whose tokens are those of full bf16. A calibrated river has
results of its own.

Without it, the cost of a cycle by the number of drafts, in the shape of Llama-3.2-1B with random weights: ms;
over a full bf16 step, the bytes of its weights, its time, and its verification's time alone; the speed over
full bf16 that the cycle's time allows where so many of a hundred drafts are right.
"""

import time
from pathlib import Path
from statistics import median

import torch

import river_ext
from bench.lib.common import machine, parser, results_path, save
from bench.lib.models import LLAMA_1B
from bench.lib.prompts import add_prompts, read_prompts
from bench.lib.weights import random_network
from river_ext.engine.drafting import draft_cost
from river_ext.engine.graph import Memory
from river_ext.engine.lossless import LosslessDecoder
from river_ext.engine.request import MOST_DRAFTS, request
from river_ext.engine.sequence import Sequence
from river_ext.engine.step import NewToken, RowOutput

SETTINGS = {
    "full bf16": {"mode": "full"},
    "full W4": {"mode": "full_w4", "river_head": "w4"},
    "river 0.9": {"mode": "river", "threshold": 0.9},
    "lossless auto": {"mode": "lossless"},
    "lossless 1": {"mode": "lossless", "draft_tokens": 1},
    "lossless 2": {"mode": "lossless", "draft_tokens": 2},
    "lossless 3": {"mode": "lossless", "draft_tokens": 3},
    "lossless 4": {"mode": "lossless", "draft_tokens": 4},
}
RIGHT = (0.6, 0.8, 0.93)  # shares of right drafts


def main() -> None:
    p = parser(__doc__.splitlines()[0])
    add_prompts(p, count=8)
    p.add_argument("--new-tokens", type=int, default=128)
    p.add_argument("--turns", type=int, default=9, help="of a cycle's cost")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{machine()['processor']}, {args.threads} threads")
    if args.model is None:
        path = results_path("lossless_cycle", args)
        lines = {"shape": "Llama-3.2-1B", "turns": args.turns, "cycle": cycle_costs(args.turns)}
    else:
        model = river_ext.load(args.model, river=args.river)
        calibration = model.river.calibration
        path = results_path("lossless_calibrated" if calibration else "lossless", args)
        lines = {
            "model": args.model.name,
            "calibration": calibration,
            "new_tokens": args.new_tokens,
            "count": args.count,
            "chat": args.chat,
        }
        lines["texts"] = [on_texts(model, file, args) for file in args.prompts]
    print(save(path, {"machine": machine(), **lines}))


# --- on a checkpoint --------------------------------------------------------------------------------------


def on_texts(model, file: Path, args) -> dict:
    prompts = read_prompts(file, args.count, args.chat)
    outputs = {name: [] for name in SETTINGS}
    for prompt in prompts:
        for name, options in SETTINGS.items():  # in turns, so that a slow minute hits all alike
            outputs[name].append(model.generate(prompt, max_new_tokens=args.new_tokens, **options))
    print(f"\n{file.name}, {len(prompts)} prompts")
    print(f"{'':<16}{'tok/s':>8}{'x':>7}{'per pass':>10}{'right':>7}{'drafting':>10}{'same':>6}")
    full = outputs["full bf16"]
    return {"file": file.name, "settings": [report(name, outputs[name], full) for name in SETTINGS]}


def report(name: str, outputs: list, full: list) -> dict:
    stats = [output.stats for output in outputs]
    drafts = sum(one.drafts for one in stats)
    line = {
        "setting": name,
        "tokens_per_second": median(one.tokens_per_second for one in stats),
        "x_full_bf16": median(
            one.tokens_per_second / other.stats.tokens_per_second
            for one, other in zip(stats, full, strict=True)
        ),
        "tokens_per_step": sum(one.new_tokens - 1 for one in stats) / sum(one.steps for one in stats),
        "acceptance": sum(one.accepted_drafts for one in stats) / drafts if drafts else None,
        "drafting": sum(one.draft_seconds for one in stats) / sum(one.decode_seconds for one in stats),
        "same": sum(a.tokens == b.tokens for a, b in zip(outputs, full, strict=True)) / len(full),
    }
    right = "" if line["acceptance"] is None else f"{line['acceptance']:.2f}"
    print(
        f"{name:<16}{line['tokens_per_second']:8.1f}{line['x_full_bf16']:7.2f}{line['tokens_per_step']:10.2f}"
        f"{right:>7}{line['drafting']:10.0%}{line['same']:6.0%}",
        flush=True,
    )
    return line


# --- the cost of a cycle ----------------------------------------------------------------------------------


def cycle_costs(turns: int) -> list[dict]:
    """Of one request, by its drafts. None of them is right here, and the time does not depend on it."""
    network = random_network(LLAMA_1B, "cpu")
    memory = Memory(network, slots=1, max_len=512)
    decoders = {drafts: decoder_of(memory, drafts) for drafts in range(MOST_DRAFTS + 1)}
    seconds = {drafts: [] for drafts in decoders}
    checking = {drafts: [] for drafts in decoders}
    for turn in range(turns + 1):
        for drafts, decoder in decoders.items():
            start = time.perf_counter()
            (output,) = decoder.step()
            if turn:  # the first warms up
                seconds[drafts].append(time.perf_counter() - start)
                checking[drafts].append(seconds[drafts][-1] - output.draft_seconds)
    cost, plain, lines = draft_cost(network), median(seconds[0]), []
    print(
        f"{'drafts':<8}{'ms':>8}{'bytes':>8}{'time':>7}{'check':>7}"
        + "".join(f"{f'x at {r:.0%}':>10}" for r in RIGHT)
    )
    for drafts, times in seconds.items():
        typical = median(times)
        line = {
            "drafts": drafts, "ms": 1e3 * typical, "bytes": 1 + drafts * cost, "time": typical / plain,
            "verification": median(checking[drafts]) / plain,
            "allows": {str(right): expected(drafts, right) * plain / typical for right in RIGHT},
            "ms_all": [1e3 * value for value in times],
        }  # fmt: skip
        lines.append(line)
        allows = "".join(f"{value:10.2f}" for value in line["allows"].values())
        print(
            f"{drafts:<8}{line['ms']:8.1f}{line['bytes']:8.2f}{line['time']:7.2f}"
            f"{line['verification']:7.2f}{allows}",
            flush=True,
        )
    return lines


def expected(drafts: int, right: float) -> float:
    """Tokens of a cycle, if each draft is right with this probability."""
    return sum(right**place for place in range(drafts + 1))


def decoder_of(memory: Memory, drafts: int) -> LosslessDecoder:
    """One request in the middle of its tokens, with so many drafts a cycle."""
    options = {"mode": "lossless", "draft_tokens": max(drafts, 1), "max_new_tokens": 400, "stop_tokens": ()}
    sequence = Sequence(request(LLAMA_1B, None, [1] * 32, options), None)
    sequence.take(RowOutput([NewToken(1, LLAMA_1B.num_hidden_layers, [])]))
    row = sequence.row(slot=0)
    row.drafting.draft_tokens = drafts
    decoder = LosslessDecoder(memory)
    decoder.start([row])
    return decoder


if __name__ == "__main__":
    main()
