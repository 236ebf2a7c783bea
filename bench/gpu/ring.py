"""Read-only bandwidth of the ring alone: the ceiling of every kernel that streams weights.

Sweeps stage size, number of stages, blocks per SM and the copy engine (`none`: cp.async, `prefetch`: bulk
copies), then reads the very sizes of the layers' weights, one launch each, in a graph: what no kernel that
reads them can beat. The checksums of every configuration are verified first. For comparison: torch's copy.
"""

import math

import torch

from bench.lib import clocks, gpu
from bench.lib.models import LAYER_SHAPES
from river_ext import ops

TOUCHED = 4096  # bytes at the start of a stage that go into a checksum: 256 readers x 16
KEPT_FREE = 4096  # of a block's shared memory: barriers, and the system's 1 KB
W4_STAGE, DENSE_STAGE = 9216, 16384
# (stage bytes, bytes per copy): what the two formats use, and around it
STAGES = [(4608, 4608), (W4_STAGE, W4_STAGE), (DENSE_STAGE, 1024), (DENSE_STAGE, DENSE_STAGE), (32768, 32768)]
DEPTHS = [2, 3, 4, 6, 8, 12, 16, 24]
LIKELY = [(W4_STAGE, W4_STAGE, 12, 1), (W4_STAGE, W4_STAGE, 24, 1), (DENSE_STAGE, DENSE_STAGE, 6, 1),
          (DENSE_STAGE, DENSE_STAGE, 12, 1), (DENSE_STAGE, 1024, 12, 1), (DENSE_STAGE, DENSE_STAGE, 6, 2),
          (32768, 32768, 6, 1)]  # fmt: skip


def read_ring(data: torch.Tensor, sums: torch.Tensor, stage: int, piece: int, stages: int, blocks: int):
    """Reads data (uint8) through a ring of `stages` x `stage` bytes, `blocks` per SM, into sums (int32)."""
    ops._C.read_ring(
        data=data.data_ptr(), bytes=data.numel(), stage_bytes=stage, copy_bytes=piece, stages=stages,
        blocks_per_sm=blocks, checksums=sums.data_ptr(), stream=torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip


def checksums(data: torch.Tensor, stage: int, blocks: int) -> list[int]:
    """What read_ring gives, by plain torch: block b has the stages b, b + blocks, ... of the data."""
    stages = -(-data.numel() // stage)
    padded = torch.zeros(-(-stages // blocks) * blocks * stage, dtype=torch.uint8, device=data.device)
    padded[: data.numel()] = data
    words = padded.view(-1, blocks, stage)[:, :, :TOUCHED].contiguous().view(torch.int32)
    words = words.transpose(0, 1).reshape(blocks, -1)
    while words.shape[1] > 1:  # exclusive or of all, by halves
        half = words.shape[1] // 2
        words = torch.cat([words[:, :half] ^ words[:, half : 2 * half], words[:, 2 * half :]], dim=1)
    return words.flatten().tolist()


def configurations(shared_memory: int, depths: list[int] = DEPTHS) -> list[tuple[int, int, int, int]]:
    """(stage bytes, bytes per copy, stages, blocks per SM) that fit an SM's shared memory."""
    return [
        (stage, piece, depth, blocks)
        for stage, piece in STAGES
        for depth in depths
        for blocks in (1, 2)
        if stage * depth <= shared_memory // blocks - KEPT_FREE
    ]


def shared_memory_per_block() -> int:
    properties = torch.cuda.get_device_properties(0)
    return getattr(properties, "shared_memory_per_block_optin", None) or 99 * 1024


def fitting(configuration: tuple[int, int, int, int]) -> bool:
    stage, _, depth, blocks = configuration
    return stage * depth <= shared_memory_per_block() // blocks - KEPT_FREE


def verify(configuration: tuple[int, int, int, int], mode: str) -> None:
    stage, piece, depth, blocks = configuration
    data = torch.randint(0, 256, (stage * (gpu.sm_count() * blocks + 7) + 48,), dtype=torch.uint8)
    sums = torch.full((gpu.sm_count() * blocks,), -1, dtype=torch.int32)
    with gpu.overlap(mode):
        read_ring(data, sums, *configuration)
    expected = checksums(data.cpu(), stage, len(sums))
    wrong = sum(a != b for a, b in zip(sums.tolist(), expected, strict=True))
    if wrong:
        raise SystemExit(f"ring: {configuration}, {mode}: {wrong} of {len(sums)} checksums are wrong")


def time_ring(datas: list[torch.Tensor], configuration, mode: str, repeats: int) -> gpu.Time:
    sums = torch.empty(2 * gpu.sm_count(), dtype=torch.int32)
    with gpu.overlap(mode):
        return gpu.time_rotated(
            lambda data: read_ring(data, sums, *configuration), datas, datas[0].numel(), repeats
        )


def random_bytes(size: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (size // 4,), dtype=torch.int32).view(torch.uint8)


def sweep(
    candidates: list, modes: tuple[str, ...], repeats: int, results: gpu.Results | None = None
) -> list[dict]:
    datas = [random_bytes(1 << 30) for _ in range(2)]
    lines = []
    for mode in modes:
        for configuration in candidates:
            stage, piece, depth, blocks = configuration
            time = time_ring(datas, configuration, mode, repeats)
            line = {
                "mode": mode, "stage_bytes": stage, "copy_bytes": piece, "stages": depth,
                "blocks_per_sm": blocks, "kib_in_flight_per_sm": stage * depth * blocks / 1024,
                "gb_s": datas[0].numel() / time.us / 1e3, **time.fields(),
            }  # fmt: skip
            lines.append(line)
            if results:
                text = f"{mode:<9} stage {stage:>6}  copies {piece:>6}  stages {depth:>3}  blocks {blocks}  "
                results(
                    "sweep", f"{text}{line['gb_s']:7.0f} GB/s  (spread {time.spread_percent:.1f} %)", **line
                )
    return lines


def best_of_likely(repeats: int = 5) -> dict:
    """The fastest of a few likely configurations; the sweep of this script looks at all."""
    candidates = [c for c in LIKELY if fitting(c)]
    with torch.device(gpu.DEVICE):  # whatever the script's default is
        return max(sweep(candidates, ("prefetch",), repeats), key=lambda line: line["gb_s"])


def ceiling(results: gpu.Results) -> float:
    """GB/s that nothing which reads memory beats: the denominator of the lines that follow."""
    best = best_of_likely()
    text = f"ceiling: {best['gb_s']:.0f} GB/s (ring of {best['stages']} x {best['stage_bytes']} bytes)"
    results("ceiling", text, **best)
    return best["gb_s"]


def weight_sizes() -> dict[str, int]:
    sizes = {}
    for name, (n, k) in LAYER_SHAPES.items():
        sizes |= {f"{name} dense": 2 * n * k, f"{name} w4": math.prod(ops.packed_shape(n, k))}
    return sizes


def read_sizes(repeats: int, results: gpu.Results) -> None:
    """Launches that read what a linear reads, one after the other in a graph."""
    for name, size in weight_sizes().items():
        # as much shared memory as two kernels in a row may have each
        configuration = (DENSE_STAGE, 1024, 6, 1) if "dense" in name else (W4_STAGE, W4_STAGE, 10, 1)
        datas = gpu.rotation(random_bytes(size))
        for mode in ("none", "launch", "prefetch"):
            time = time_ring(datas, configuration, mode, repeats)
            line = {"size": name, "bytes": size, "mode": mode, "gb_s": size / time.us / 1e3, **time.fields()}
            results("size", f"{name:<18} {mode:<9} {time.us:7.2f} us  {line['gb_s']:6.0f} GB/s", **line)


def copy_gb_s(repeats: int) -> float:
    """torch's copy from device to device, bytes read plus bytes written."""
    source = random_bytes(1 << 31)
    target = torch.empty_like(source)
    time = gpu.time_graph(gpu.capture(lambda: target.copy_(source)), 1, repeats)
    return 2 * source.numel() / time.us / 1e3


def main() -> None:
    p = gpu.parser(__doc__.splitlines()[0])
    p.add_argument("--repeats", type=int, default=5)
    args = p.parse_args()
    gpu.require_cuda()
    torch.set_default_device("cuda")
    results, modes = gpu.Results("ring", args), ("none", "prefetch")
    candidates = configurations(shared_memory_per_block(), [2, 4, 8, 16, 24] if args.quick else DEPTHS)
    for configuration in candidates:
        for mode in modes:
            verify(configuration, mode)
    print(f"{2 * len(candidates)} configurations read every stage (checksums)", flush=True)
    lines = sweep(candidates, modes, args.repeats, results)
    best = max(lines, key=lambda line: line["gb_s"])
    results("ceiling", f"ceiling {best['gb_s']:.0f} GB/s", **best)
    budget = [line for line in lines if line["blocks_per_sm"] == 1 and line["kib_in_flight_per_sm"] <= 108]
    half = max(budget, key=lambda line: line["gb_s"])
    results("half an SM", f"within half an SM's shared memory {half['gb_s']:.0f} GB/s", **half)
    copied = copy_gb_s(args.repeats)
    results("copy", f"torch's copy {copied:.0f} GB/s", gb_s=copied)
    read_sizes(args.repeats, results)
    data, sums = random_bytes(1 << 30), torch.empty(2 * gpu.sm_count(), dtype=torch.int32)
    configuration = tuple(best[key] for key in ("stage_bytes", "copy_bytes", "stages", "blocks_per_sm"))
    load = gpu.capture(lambda: read_ring(data, sums, *configuration))
    results("clocks", **clocks.under_load(load))


if __name__ == "__main__":
    main()
