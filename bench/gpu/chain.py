"""What the boundary between two dependent kernels costs, in a graph: none, launch and prefetch.

Chains of GEMVs, each on the output of the one before, over square weights of three sizes that no cache holds
together. Per size and kind of overlap: us per kernel, and what of it is left when the time in which the ring
reads the same bytes is taken away. The intercept of us over bytes is the same cost without the ring's number.
Chains of tiny kernels show the boundary alone. `none` also copies by cp.async instead of bulk copies, which
bench/gpu/ring.py tells apart.
"""

from functools import partial

import torch

from bench.gpu import ring
from bench.lib import clocks, gpu, variants
from bench.lib.variants import DEFAULT
from bench.lib.weights import dense_weight, packed_weight
from river_ext import ops

SIZES = (2048, 4096, 8192)
MODES = ("none", "launch", "prefetch")
LENGTH = 32  # kernels from one start of a chain to the next
TINY = 200  # kernels of a chain of tiny ones


def chain(op, x: torch.Tensor):
    """A call for gpu.time_rotated that feeds each launch what the one before wrote.

    Now and then it starts anew, before powers of the weight grow or vanish.
    """
    state, count = x, 0

    def call(weight: torch.Tensor) -> None:
        nonlocal state, count
        state, count = op(state if count % LENGTH else x, weight), count + 1

    return call


def intercept(points: list[tuple[float, float]]) -> float:
    """Of the least-squares line through (x, y)."""
    n = len(points)
    mean_x, mean_y = (sum(values) / n for values in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y - slope * mean_x


def measure_chains(
    results: gpu.Results, ceiling: float, sizes: tuple[int, ...], designs: list[str], repeats: int
) -> list[dict]:
    lines = []
    for size in sizes:
        dense = gpu.rotation(dense_weight(size, size))
        packed = gpu.rotation(packed_weight(size, size))
        kinds = {
            "linear": (dense, ops.linear),
            "linear_w4": (packed, partial(ops.linear_w4, out_features=size)),
            "torch": (dense, torch.nn.functional.linear),
        }
        x = torch.randn(1, size, dtype=torch.bfloat16)
        for kernel, (weights, op) in kinds.items():
            for mode in MODES if kernel != "torch" else ("none",):
                compared = designs if mode == "prefetch" else [DEFAULT]
                read = gpu.size_of(weights[0])
                with gpu.overlap(mode):
                    times = variants.time_rotated(compared, chain(op, x), weights, read, repeats)
                for design, time in times.items():
                    line = {"kernel": kernel, "size": size, "mode": mode, "variant": design, "bytes": read}
                    line |= {"gb_s": read / time.us / 1e3, "us_over_ring": time.us - read / ceiling / 1e3}
                    lines.append(line | time.fields())
                    text = (
                        f"{kernel:<10} {size:>5} {mode:<9} {design:<16} {time.us:7.2f} us "
                        f"{line['gb_s']:6.0f} GB/s  {line['us_over_ring']:6.2f} us over the ring  "
                        f"(spread {time.spread_percent:.1f} %)"
                    )
                    results("chain", text, **lines[-1])
    return lines


def intercepts(results: gpu.Results, lines: list[dict]) -> None:
    """us per kernel as its bytes go to 0, by kernel, mode and design."""
    for kind in dict.fromkeys((line["kernel"], line["mode"], line["variant"]) for line in lines):
        points = [
            (line["bytes"], line["us"])
            for line in lines
            if (line["kernel"], line["mode"], line["variant"]) == kind
        ]
        if len(points) > 1:
            kernel, mode, design = kind
            us = intercept(points)
            text = f"{kernel:<10} {mode:<9} {design:<16} intercept {us:6.2f} us"
            results("intercept", text, kernel=kernel, mode=mode, variant=design, us=us)


def measure_tiny(results: gpu.Results, repeats: int) -> None:
    """us per kernel of chains whose kernels do next to nothing."""
    x, y = (torch.randn(1, 1024, dtype=torch.bfloat16) for _ in range(2))

    def similarities(_) -> None:
        ops.state_similarity(x, y)

    def adds(_) -> None:
        x.add_(0.0)

    cases = [("state_similarity", mode, similarities) for mode in MODES] + [("torch add_", "none", adds)]
    for kernel, mode, call in cases:
        with gpu.overlap(mode):
            time = gpu.time_rotated(call, range(TINY), 4096, repeats)
        text = f"{kernel:<16} {mode:<9} {time.us:6.2f} us  (spread {time.spread_percent:.1f} %)"
        results("tiny", text, kernel=kernel, mode=mode, **time.fields())


def main() -> None:
    p = gpu.parser(__doc__.splitlines()[0])
    p.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    p.add_argument("--repeats", type=int, default=10)
    variants.add_argument(p)
    args = p.parse_args()
    gpu.require_cuda()
    torch.set_default_device("cuda")
    results = gpu.Results("chain", args)
    ceiling, sizes = ring.ceiling(results), SIZES[:2] if args.quick else args.sizes
    intercepts(results, measure_chains(results, ceiling, sizes, variants.designs(args), args.repeats))
    measure_tiny(results, args.repeats)
    results("clocks", **clocks.under_load(clocks.streaming_graph()))


if __name__ == "__main__":
    main()
