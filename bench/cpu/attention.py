"""decode_attention in the shapes of Llama-3.2-1B and Llama-3.1-8B, on the CPU.

Rows of one slot against its cache, as in decoding (1 row) and verification: us | x one row | GB/s of the
cache | GB/s of a plain read of it | % of that. Calls go round the slots of a cache of some 300 MB. Then all
rows of a prompt, and x torch's scaled_dot_product_attention(is_causal=True). All that is compared takes
turns; us and GB/s are medians of calls, % and x medians of turns.
"""

from itertools import chain
from statistics import median

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.lib.common import interleaved, machine, parser, reader, results_path, save, times
from river_ext import ops

SHAPES = {"1b": (32, 8, 64), "8b": (32, 8, 128)}  # query heads, KV heads, head_dim
WORKING_SET = 3e8  # bytes


def main() -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--rows", type=int, nargs="+", default=[1, 2, 5, 8])
    p.add_argument("--context", type=int, default=8192)
    p.add_argument("--prompts", type=int, nargs="*", default=[256, 1024, 4096])
    p.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    p.add_argument("--passes", type=int, default=2, help="over the slots")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    path = results_path("attention", args)
    reader()  # compiles
    print(f"{machine()['processor']}, {args.threads} threads")
    results = []
    for name in args.shapes:
        results += measure(name, args)
    print(save(path, {"machine": machine(), "attention": results}))


def int32(values) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def measure(name: str, args) -> list[dict]:
    heads, kv_heads, head_dim = SHAPES[name]
    slots = max(2, round(WORKING_SET / (4 * kv_heads * head_dim * args.context)))
    k, v = (torch.randn(slots, kv_heads, args.context, head_dim).bfloat16() for _ in range(2))
    caches = [(slot, k[slot], v[slot]) for slot in range(slots)]

    def attend(rows):
        query = torch.randn(rows, heads, head_dim).bfloat16()
        positions = int32(range(args.context - rows, args.context))
        return lambda cache: ops.decode_attention(query, k, v, int32([cache[0]] * rows), positions)

    calls = {rows: (caches, attend(rows)) for rows in sorted({1, *args.rows})}
    calls["read"] = (caches, lambda cache: [reader()(part) for part in cache[1:]])
    seconds = interleaved(calls, args.passes)
    us = {label: 1e6 * median(chain.from_iterable(turns)) for label, turns in seconds.items()}
    size = k[0].nbytes + v[0].nbytes
    lines = []
    for rows in args.rows:
        line = {
            "shape": name, "context": args.context, "rows": rows, "us": us[rows],
            "x_one_row": times(seconds, 1, rows), "gb_s": size / us[rows] / 1e3,
            "read_gb_s": size / us["read"] / 1e3, "percent_of_read": 100 * times(seconds, rows, "read"),
        }  # fmt: skip
        lines.append(line)
        print(
            f"{name:<3}{rows:>5} rows{line['us']:9.0f}{line['x_one_row']:6.2f}{line['gb_s']:7.1f}"
            f"{line['read_gb_s']:7.1f}{line['percent_of_read']:5.0f}",
            flush=True,
        )
    return lines + [measure_prompt(name, rows) for rows in args.prompts]


def measure_prompt(name: str, rows: int) -> dict:
    heads, kv_heads, head_dim = SHAPES[name]
    query = torch.randn(rows, heads, head_dim).bfloat16()
    k, v = (torch.randn(1, kv_heads, rows, head_dim).bfloat16() for _ in range(2))
    slots, positions = int32([0] * rows), int32(range(rows))
    plain = query.transpose(0, 1)[None].contiguous()
    wide = [x.repeat_interleave(heads // kv_heads, 1) for x in (k, v)]
    calls = {
        "ours": ([None], lambda _: ops.decode_attention(query, k, v, slots, positions)),
        "torch": ([None], lambda _: scaled_dot_product_attention(plain, *wide, is_causal=True)),
    }
    seconds = interleaved(calls, 1)
    us = 1e6 * median(chain.from_iterable(seconds["ours"]))
    line = {"shape": name, "prompt": rows, "us": us, "x_torch": times(seconds, "ours", "torch")}
    print(f"{name:<3}{rows:>5} prompt{us:9.0f} us, {line['x_torch']:.2f} x torch", flush=True)
    return line


if __name__ == "__main__":
    main()
