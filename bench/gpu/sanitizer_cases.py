"""Every CUDA op once or twice on small odd shapes, for compute-sanitizer (gpu_suite.sh).

Alone it only shows that nothing is refused. Tensors come straight from the driver (no caching allocator), so
that a tool sees the end of each.
"""

import os

import torch

from bench.gpu import ring
from bench.lib import gpu
from bench.lib.models import TINY
from bench.lib.weights import random_network
from river_ext import ops
from river_ext.engine.graph import Memory, Runner, whole_steps
from river_ext.engine.lossless import CycleRunner, cycle
from river_ext.engine.request import request
from river_ext.engine.step import Row

DONE = "all cases ran"


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype).cuda()


def packed(n: int, k: int) -> torch.Tensor:
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    groups = -(-k // ops.TILE_COLS)
    return ops.pack_w4(q, 0.1 * torch.rand(n, groups).half(), 7 + torch.rand(n, groups).half()).cuda()


def linears() -> None:
    for n, k in ((40, 192), (33, 4160)):  # the second one splits K
        for rows, dtype in ((1, torch.bfloat16), (3, torch.float16), (8, torch.bfloat16)):
            x, bias = random(rows, k, dtype=dtype), random(n, dtype=dtype)
            ops.linear(x, random(n, k, dtype=dtype), bias)
            ops.linear_w4(x, packed(n, k), n, bias)


def w4_format() -> None:
    tiles = packed(40, 192)
    q, scale, zero = ops.unpack_w4(tiles, 40, 192)
    ops.pack_w4(q, scale, zero)
    ops.dequantize_w4(tiles, 40, 192, torch.bfloat16)


def attention() -> None:
    k, v = (random(2, 2, 300, 32) for _ in range(2))
    ops.decode_attention(random(3, 6, 32), k, v, int32(0, 1, -1), int32(299, 64, 0))
    ops.decode_attention(random(1, 6, 32), k, v, int32(1), int32(0), sliding_window=5)
    ops.decode_attention(random(5, 6, 32), k, v, int32(1, 0, 1, 1, 1), int32(62, 9, 63, 64, 65))


def heads() -> None:
    hidden, norm, weight = random(2, 192), random(192), random(300, 192)
    ops.lm_head(hidden, norm, weight, 1e-5)
    ops.lm_head_w4(hidden, norm, packed(300, 192), 300, 1e-5)
    sampling = {
        "temperature": torch.tensor([0.0, 0.7]).cuda(), "seeds": torch.tensor([1, 2]).cuda(),
        "positions": int32(3, 4),
    }  # fmt: skip
    ops.lm_head(hidden, norm, weight, 1e-5, return_logits=False, **sampling)


def similarity() -> None:
    ops.state_similarity(random(3, 192), random(3, 192))


def read_ring() -> None:
    with torch.device("cuda"):
        for mode in ("prefetch", "none"):
            ring.verify((1024, 256, 3, 2), mode)


def random_memory() -> Memory:
    memory = Memory(random_network(TINY), slots=2, max_len=64)
    memory.cache.k.normal_()
    memory.cache.v.normal_()
    return memory


@torch.inference_mode()
def layers_and_steps() -> None:
    """Layers alone, and device-controlled steps: rows that leave after one layer, at once, and never."""
    memory = random_memory()
    hidden, one_row, both, layer = random(2, 192), int32(0, -1), int32(1, 0), memory.network.layers[0]
    for together in (True, False):
        runner = Runner(memory, rows=2, stop_tokens=4, together=together)
        start(runner, hidden, one_row, thresholds=(-2.0, -2.0), limit=3)
        layer.block(hidden, runner.place)
        layer.exit(hidden, runner.place)
        for threshold, limit in ((-2.0, 3), (-2.0, 0), (2.0, 3)):
            start(runner, hidden, one_row, thresholds=(threshold, threshold), limit=limit)
            whole_steps(runner, count=1, filters=False)
        start(runner, hidden, both, thresholds=(-2.0, 2.0), limit=3)  # both paths, unless together
        whole_steps(runner, count=2, filters=True)


def start(runner: Runner, hidden, slots, thresholds: tuple[float, float], limit: int) -> None:
    runner.hidden.copy_(hidden)
    runner.slots.copy_(slots)
    runner.positions.copy_(int32(40, 50))
    runner.draw_positions.copy_(int32(41, 51))
    runner.remaining.fill_(100)
    runner.thresholds.copy_(torch.tensor(thresholds))
    runner.decision.min_layers.fill_(1)
    runner.decision.limit.fill_(limit)


@torch.inference_mode()
def whole_cycle() -> None:
    """Of two requests, one of which wants a draft less."""
    memory = random_memory()
    asked = request(TINY, None, [0], {"mode": "lossless", "max_new_tokens": 20, "stop_tokens": ()})
    runner = CycleRunner(memory, requests=2, stop_tokens=4)
    runner.start([Row(5, 40, slot, asked, remaining=20) for slot in (1, 0)])
    runner.want([2, 1])
    memory.lead_caller()
    cycle(runner, drafts=2, filters=True)


def ends_of_a_cycle() -> None:
    """The ends of two drafts and of their verification, of a request that goes on and one that ends."""
    embed_tokens, (length, requests) = random(40, 200), (3, 2)
    drafts = torch.full((length, requests), -1).cuda()
    hidden, slots, places = random(requests, 200), int32(0, 1), [int32(7, 9), int32(8, 10)]
    verify_hidden, verify_slots = random(length * requests, 200), int32(0, 1, -1, -1, -1, -1)
    verify_places = [int32(7, 9, 8, 10, 9, 11), int32(8, 10, 9, 11, 10, 12)]
    written = hidden, slots, *places, verify_hidden, verify_slots
    margins = torch.ones(requests).cuda()
    for index, tokens in enumerate(([3, 39], [0, -1])):
        tokens = torch.tensor(tokens).cuda()
        ops.draft_advance(tokens, margins, index, int32(2, 2), margins, embed_tokens, drafts, *written)
    targets, stop_tokens = torch.tensor([3, 39, 0, 5, 39, 6]).cuda(), torch.tensor([[1, -1], [5, 6]]).cuda()
    records = torch.zeros(2, 1 + requests + length * requests, dtype=torch.int32).pin_memory()
    ops.accept(
        targets, drafts, embed_tokens, stop_tokens, int32(9, 9), *written, *verify_places, int32(1), records
    )


def main() -> None:
    gpu.parser(__doc__.splitlines()[0]).parse_args()
    gpu.require_cuda(warm=False)
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # torch looks at its first allocation
    cases = [
        similarity, w4_format, linears, heads, attention, read_ring, layers_and_steps, whole_cycle,
        ends_of_a_cycle,
    ]  # fmt: skip
    for mode in ("prefetch", "none"):
        with gpu.overlap(mode):
            for case in cases:
                case()
                torch.cuda.synchronize()
                print(f"{mode}: {case.__name__}", flush=True)
    print(DONE, flush=True)


if __name__ == "__main__":
    main()
