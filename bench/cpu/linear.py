"""Dense and W4 linears at T = 1..8 in the layer shapes of Llama-3.2-1B and Llama-3.1-8B, on the CPU.

One line per result: us | GB/s of weights | GB/s of a plain read of the same weights | % of that | % that a
captured call has, which is how the engine runs ops | x torch's dense bf16 linear | x torch's own int4 linear
(W4 only; group 64, the kernel behind torch's CPU int4 quantisation). Weights cycle over at least 1 GB, so
that no cache holds them. All that is compared, the read included, takes turns on some 60 MB of them, or on a
single larger one; us and GB/s are medians of calls, % and x medians of turns.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from statistics import median

import torch

from bench.lib.common import interleaved, machine, parser, reader, results_path, save, times
from bench.lib.models import LAYER_SHAPES
from bench.lib.weights import dense_weight, packed_weight
from river_ext import ops

WORKING_SET = 1.0e9  # bytes


def main() -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    p.add_argument("--shapes", nargs="+", default=list(LAYER_SHAPES), choices=LAYER_SHAPES)
    p.add_argument("--passes", type=int, default=5, help="over the weights of a shape")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    path = results_path("linear", args)
    reader()  # compiles
    print(f"{machine()['processor']}, {args.threads} threads")
    header = f"{'linear':<12}{'T':>2} {'format':<6}{'us':>9}{'GB/s':>7}{'read':>7}{'%':>5}{'captured':>9}"
    print(header + f"{'x dense':>9}{'x int4':>8}")
    results = []
    for name in args.shapes:
        results += measure(name, args.rows, args.passes)
    print(save(path, {"machine": machine(), "linear": results}))


def measure(name: str, rows: list[int], passes: int) -> list[dict]:
    n, k = LAYER_SHAPES[name]
    weights = {"dense": copied(dense_weight(n, k)), "w4": copied(packed_weight(n, k))}
    int4, read = int4_weights(n, k), reader()
    lines = []
    for t in rows:
        x = torch.randn(t, k).bfloat16()
        calls = {
            "dense": (weights["dense"], lambda w, x=x: ops.linear(x, w)),
            "dense captured": (captured(weights["dense"], lambda w, x=x: ops.linear(x, w)), replay),
            "read dense": (weights["dense"], read),
            "torch": (weights["dense"], lambda w, x=x: torch.nn.functional.linear(x, w)),
            "w4": (weights["w4"], lambda w, x=x: ops.linear_w4(x, w, n)),
            "w4 captured": (captured(weights["w4"], lambda w, x=x: ops.linear_w4(x, w, n)), replay),
            "read w4": (weights["w4"], read),
            "torch int4": (int4, lambda w, x=x: int4_linear(x, w)),
        }
        seconds = interleaved(calls, passes)
        us = {label: 1e6 * median(chain.from_iterable(turns)) for label, turns in seconds.items()}
        for label in weights:
            size = weights[label][0].nbytes
            line = {
                "shape": name, "out_features": n, "in_features": k, "rows": t, "format": label,
                "us": us[label], "gb_s": size / us[label] / 1e3,
                "captured_us": us[f"{label} captured"],
                "captured_percent_of_read": 100 * times(seconds, f"{label} captured", f"read {label}"),
                "read_gb_s": size / us[f"read {label}"] / 1e3,
                "percent_of_read": 100 * times(seconds, label, f"read {label}"),
                "x_torch_dense": times(seconds, label, "torch"),
                "x_torch_int4": times(seconds, label, "torch int4") if label == "w4" else None,
            }  # fmt: skip
            lines.append(line)
            x_int4 = f"{line['x_torch_int4']:8.2f}" if label == "w4" else ""
            shares = f"{line['percent_of_read']:5.0f}{line['captured_percent_of_read']:9.0f}"
            print(
                f"{name:<12}{t:>2} {label:<6}{us[label]:9.0f}{line['gb_s']:7.1f}{line['read_gb_s']:7.1f}"
                f"{shares}{line['x_torch_dense']:9.2f}{x_int4}",
                flush=True,
            )
    return lines


def captured(weights: list[torch.Tensor], linear: Callable[[torch.Tensor], torch.Tensor]) -> list:
    """Its graphs, one for each weight."""
    graphs = [ops._C.Graph() for _ in weights]
    for graph, weight in zip(graphs, weights, strict=True):
        graph.capture(partial(linear, weight))
    return graphs


def replay(graph) -> None:
    graph.replay(0, 1)


def copied(weight: torch.Tensor) -> list[torch.Tensor]:
    return [weight.clone() for _ in range(max(2, int(WORKING_SET // weight.nbytes)))]


def int4_weights(n: int, k: int) -> list[tuple]:
    packed = torch._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (n, k), dtype=torch.int32), 1)
    scale_and_zero = (torch.rand(k // 64, n, 2) * 0.01).bfloat16()
    return [(weight, scale_and_zero.clone()) for weight in copied(packed)]


def int4_linear(x: torch.Tensor, weight: tuple) -> torch.Tensor:
    packed, scale_and_zero = weight
    return torch._weight_int4pack_mm_for_cpu(x, packed, 64, scale_and_zero)


if __name__ == "__main__":
    main()
