"""Dense and W4 linears at T = 1..8 in the layer shapes of Llama-3.2-1B and Llama-3.1-8B, on the CPU.

One line per result: us | GB/s of weights | % of the measured read bandwidth | x torch's dense bf16 linear |
x torch's own int4 linear (W4 only; group 64, the kernel behind torch's CPU int4 quantisation).
Weights cycle over at least 1 GB, so that no cache holds them. The bandwidth is measured before and after each
shape and the larger one counts: on a shared machine it moves within minutes.
"""

import torch
from common import LAYER_SHAPES, machine, parser, read_bandwidth, save, seconds_per_call

from river_ext import ops

WORKING_SET = 1.0e9  # bytes


def main() -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    p.add_argument("--shapes", nargs="+", default=list(LAYER_SHAPES), choices=LAYER_SHAPES)
    p.add_argument("--repeats", type=int, default=5)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{machine()['processor']}, {args.threads} threads")
    print(f"{'linear':<12}{'T':>2} {'format':<6}{'us':>9}{'GB/s':>7}{'%':>5}{'x dense':>9}{'x int4':>8}")
    results = []
    for name in args.shapes:
        results += measure(name, args.rows, args.repeats)
    print(save("linear", args.out, {"machine": machine(), "linear": results}))


def measure(name: str, rows: list[int], repeats: int) -> list[dict]:
    n, k = LAYER_SHAPES[name]
    calls = {
        "dense": (dense_weights(n, k), ops.linear),
        "w4": (packed_weights(n, k), lambda x, w: ops.linear_w4(x, w, n)),
    }
    peers = {
        "torch": (calls["dense"][0], torch.nn.functional.linear),
        "torch int4": (int4_weights(n, k), int4_linear),
    }
    before = read_bandwidth(0.5, 3)
    times = {t: time_all(calls | peers, torch.randn(t, k).bfloat16(), repeats) for t in rows}
    bandwidth = max(before, read_bandwidth(0.5, 3))
    print(f"{name}: {n} x {k}, read bandwidth {bandwidth:.1f} GB/s")
    lines = []
    for t, us in times.items():
        for label in calls:
            rate = bytes_of(calls[label][0][0]) / us[label] / 1e3
            line = {
                "shape": name, "out_features": n, "in_features": k, "rows": t, "format": label,
                "us": us[label], "gb_s": rate, "read_gb_s": bandwidth,
                "percent_of_read": 100 * rate / bandwidth,
                "x_torch_dense": us["torch"] / us[label],
                "x_torch_int4": us["torch int4"] / us[label] if label == "w4" else None,
            }  # fmt: skip
            lines.append(line)
            int4 = f"{line['x_torch_int4']:8.2f}" if label == "w4" else ""
            print(
                f"{name:<12}{t:>2} {label:<6}{us[label]:9.0f}{rate:7.1f}{line['percent_of_read']:5.0f}"
                f"{line['x_torch_dense']:9.2f}{int4}",
                flush=True,
            )
    return lines


def time_all(calls: dict, x: torch.Tensor, repeats: int) -> dict[str, float]:
    """Microseconds of each (weights, op)."""
    return {
        label: 1e6 * seconds_per_call(lambda w, op=op: op(x, w), weights, repeats)
        for label, (weights, op) in calls.items()
    }


def copies(size: int) -> range:
    return range(max(2, int(WORKING_SET // size)))


def dense_weights(n: int, k: int) -> list[torch.Tensor]:
    return [(torch.randn(n, k) * k**-0.5).bfloat16() for _ in copies(2 * n * k)]


def packed_weights(n: int, k: int) -> list[torch.Tensor]:
    def one():
        packed = torch.randint(0, 256, ops.packed_shape(n, k), dtype=torch.uint8)
        metadata = torch.stack([torch.full((16,), 0.01), torch.full((16,), 7.5)], -1).half().flatten()
        packed[..., 512:] = metadata.view(torch.uint8)
        return packed

    return [one() for _ in copies(n * k * 576 // 1024)]


def int4_weights(n: int, k: int) -> list[tuple]:
    def one():
        packed = torch._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (n, k), dtype=torch.int32), 1)
        return packed, (torch.rand(k // 64, n, 2) * 0.01).bfloat16()

    return [one() for _ in copies(n * k * 9 // 16)]


def int4_linear(x: torch.Tensor, weight: tuple) -> torch.Tensor:
    packed, scale_and_zero = weight
    return torch._weight_int4pack_mm_for_cpu(x, packed, 64, scale_and_zero)


def bytes_of(weight: torch.Tensor) -> int:
    return weight.numel() * weight.element_size()


if __name__ == "__main__":
    main()
