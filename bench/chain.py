"""What the boundary between two dependent kernels costs, in a graph: none, launch and prefetch.

Chains of GEMVs, each on the output of the one before, over square weights of three sizes that no cache holds
together. Per size and kind of overlap: us per kernel, and what of it is left when the time in which the ring
reads the same bytes is taken away. The intercept of us over bytes is the same cost without the ring's number.
Chains of tiny kernels show the boundary alone. `none` also copies by cp.async instead of bulk copies, which
bench/ring.py tells apart.
"""

from functools import partial

import gpu
import ring
import torch

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


def measure_chains(ceiling: float, sizes: tuple[int, ...], repeats: int) -> list[dict]:
    lines = []
    for size in sizes:
        kinds = {
            "linear": (gpu.rotation(gpu.dense_weight(size, size)), ops.linear),
            "linear_w4": (
                gpu.rotation(gpu.packed_weight(size, size)),
                partial(ops.linear_w4, out_features=size),
            ),
            "torch": (None, torch.nn.functional.linear),
        }
        kinds["torch"] = (kinds["linear"][0], kinds["torch"][1])
        x = torch.randn(1, size, dtype=torch.bfloat16)
        for kernel, (weights, op) in kinds.items():
            for mode in MODES if kernel != "torch" else ("none",):
                read = gpu.size_of(weights[0])
                with gpu.overlap(mode):
                    time = gpu.time_rotated(chain(op, x), weights, read, repeats)
                line = {"kernel": kernel, "size": size, "mode": mode, "bytes": read, **time.fields()}
                line |= {"gb_s": read / time.us / 1e3, "us_over_ring": time.us - read / ceiling / 1e3}
                lines.append(line)
                print(
                    f"{kernel:<10} {size:>5} {mode:<9} {time.us:7.2f} us {line['gb_s']:6.0f} GB/s  "
                    f"{line['us_over_ring']:6.2f} us over the ring  (spread {time.spread_percent:.1f} %)",
                    flush=True,
                )
    return lines


def intercepts(lines: list[dict]) -> list[dict]:
    """us per kernel as its bytes go to 0, by kernel and mode."""
    result = []
    for kernel, mode in dict.fromkeys((line["kernel"], line["mode"]) for line in lines):
        points = [(ln["bytes"], ln["us"]) for ln in lines if (ln["kernel"], ln["mode"]) == (kernel, mode)]
        if len(points) > 1:
            result.append({"kernel": kernel, "mode": mode, "intercept_us": intercept(points)})
            print(f"{kernel:<10} {mode:<9} intercept {result[-1]['intercept_us']:6.2f} us", flush=True)
    return result


def measure_tiny(repeats: int) -> list[dict]:
    """us per kernel of chains whose kernels do next to nothing."""
    x, y = (torch.randn(1, 1024, dtype=torch.bfloat16) for _ in range(2))

    def similarities(_) -> None:
        ops.state_similarity(x, y)

    def adds(_) -> None:
        x.add_(0.0)

    cases = [("state_similarity", mode, similarities) for mode in MODES] + [("torch add_", "none", adds)]
    lines = []
    for kernel, mode, call in cases:
        with gpu.overlap(mode):
            time = gpu.time_rotated(call, range(TINY), 4096, repeats)
        lines.append({"kernel": kernel, "mode": mode, **time.fields()})
        print(
            f"{kernel:<16} {mode:<9} {time.us:6.2f} us  (spread {time.spread_percent:.1f} %)",
            flush=True,
        )
    return lines


def main() -> None:
    p = gpu.parser(__doc__.splitlines()[0])
    p.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    p.add_argument("--repeats", type=int, default=10)
    args = p.parse_args()
    gpu.require_cuda()
    torch.set_default_device("cuda")
    ceiling = ring.ceiling()
    lines = measure_chains(ceiling, SIZES[:2] if args.quick else args.sizes, args.repeats)
    tiny = measure_tiny(args.repeats)
    weight, x = gpu.dense_weight(8192, 8192), torch.randn(1, 8192, dtype=torch.bfloat16)
    load = gpu.capture(lambda: ops.linear(x, weight))
    found = {"ceiling_gb_s": ceiling, "chains": lines, "intercepts": intercepts(lines), "tiny": tiny}
    gpu.save("chain", args, found, load)


if __name__ == "__main__":
    main()
