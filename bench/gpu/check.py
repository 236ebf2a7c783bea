"""What must be known of a GPU before anything else is measured on it. The suite gives each check a process.

edges       kernels of captured steps and cycles may start before the kernels ahead of them have ended
runtime     the static CUDA runtime of the extension works beside torch's
stream      an op runs on torch's current stream, and in a capture on the captured one
magic       the fp32 sums of W4 products are as exact as the format promises, the magic constant included
ring        the read-only ceiling, quickly (bench/gpu/ring.py sweeps)
"""

import ctypes
import subprocess
import time

import torch

from bench.gpu import ring
from bench.gpu.suite_parts import CHECKS
from bench.lib import gpu
from bench.lib.models import TINY
from bench.lib.weights import dense_weight, random_network
from river_ext import ops
from river_ext.engine.graph import Memory, Runner, whole_steps
from river_ext.engine.lossless import CycleRunner, cycle

# Relative errors of the sums; the output's own rounding is apart. Exact fp32 products would leave a tenth;
# tensor cores cut off what they add up instead of rounding it, which about doubles that.
MAGIC_LIMITS = {torch.bfloat16: 5e-5, torch.float16: 5.7e-4}
SLEEP_CYCLES = 200_000_000  # about 0.1 s


def check_runtime() -> dict:
    """torch first, then our ops, then torch again, all on one context; errors must not leak either way."""
    x, weight = torch.randn(1, 2048).bfloat16(), dense_weight(2048, 2048)
    expected = x.double() @ weight.double().T
    error = gpu.relative_error(ops.linear(x, weight), expected)
    refused = ""
    try:
        ops.linear(x, weight.cpu())
    except RuntimeError as refusal:
        refused = str(refusal)
    after = gpu.relative_error(x @ weight.T, expected)
    libraries = subprocess.run(["ldd", ops._C.__file__], capture_output=True, text=True).stdout
    image = ops._C.cuda_image()
    text = f"error {error:.1e}, torch's after it {after:.1e}, sm_{image['code']} on sm_{image['device']}"
    return {
        "ok": error < 1e-2 and after < 1e-2 and bool(refused), "text": text, "relative_error": error,
        "refusal": refused, "links_libcudart": "libcudart" in libraries, "image": image,
    }  # fmt: skip


def check_stream() -> dict:
    """On a side stream that is held up, an op must see what the stream was given before it."""
    weight = dense_weight(512, 512)
    old, new = (torch.randn(1, 512).bfloat16() for _ in range(2))
    expected = {name: ops.linear(x, weight) for name, x in (("old", old), ("new", new))}
    x, stream = old.clone(), torch.cuda.Stream()
    with torch.cuda.stream(stream):  # its workspace is allocated now, before the stream is held up
        ops.linear(x, weight)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        x.copy_(new)
        out = ops.linear(x, weight)
    held_up = not stream.query()
    torch.cuda.synchronize()
    side = torch.equal(out, expected["new"])
    x.copy_(old)
    captured = {}

    def run() -> None:
        captured["out"] = ops.linear(x, weight)

    graph = gpu.capture(run)
    x.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    replayed = torch.equal(captured["out"], expected["new"])
    facts = {"side_stream": side, "graph_replay": replayed, "stream_was_held_up": held_up}
    wrong = [name for name, right in facts.items() if not right]
    return {"ok": not wrong, "text": f"not so: {', '.join(wrong)}" if wrong else "as given", **facts}


def check_edges() -> dict:
    """Of a step as `generate` captures it, with device control, and of a lossless cycle."""
    memory = Memory(random_network(TINY), slots=1, max_len=64)
    steps = Runner(memory, rows=1, stop_tokens=4, together=False)
    cycles = CycleRunner(memory, requests=1, stop_tokens=4)
    captured = {
        "step": lambda: whole_steps(steps, count=1, filters=False),
        "cycle": lambda: cycle(cycles, drafts=2, filters=False),
    }
    found = {}
    for name, run in captured.items():
        with gpu.overlap("prefetch"):
            graph = gpu.capture(torch.inference_mode()(run), keep_graph=True)
        found[name] = programmatic_edges(graph)
    return edges_found(found, torch.cuda.get_device_capability())


def edges_found(found: dict[str, dict], capability: tuple[int, int]) -> dict:
    """Of programmatic_edges by what was captured."""
    waits = [name for name, edges in found.items() if edges.get("programmatic") == 0]
    said = [
        f"{name}: not counted: {edges['not_run']}"
        if "not_run" in edges
        else f"{edges['programmatic']} of {edges['edges']} edges of a captured {name} are programmatic"
        + (": every kernel waits for the one ahead to end" if name in waits else "")
        for name, edges in found.items()
    ]
    # older chips have no such launch
    return {"ok": not waits or capability < (9, 0), "text": "; ".join(said), "graphs": found}


class EdgeData(ctypes.Structure):
    """CUgraphEdgeData of the driver; type 1 = programmatic."""

    _fields_ = [
        ("from_port", ctypes.c_ubyte), ("to_port", ctypes.c_ubyte), ("type", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte * 5),
    ]  # fmt: skip


def programmatic_edges(graph: torch.cuda.CUDAGraph) -> dict:
    """Edges of a captured graph, and how many let a kernel start early: a capture may drop that."""
    try:
        ask = ctypes.CDLL("libcuda.so.1").cuGraphGetEdges_v2
        handle, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t(0)
        if status := ask(handle, None, None, None, ctypes.byref(count)):
            return {"not_run": f"cuGraphGetEdges_v2: error {status}"}
        nodes = [(ctypes.c_void_p * count.value)() for _ in range(2)]
        data = (EdgeData * count.value)()
        if status := ask(handle, *nodes, data, ctypes.byref(count)):
            return {"not_run": f"cuGraphGetEdges_v2: error {status}"}
    except (AttributeError, OSError, RuntimeError, TypeError) as error:
        return {"not_run": str(error).splitlines()[0]}
    return {"edges": count.value, "programmatic": sum(edge.type == 1 for edge in data)}


def cancelling_product(k: int, dtype: torch.dtype, rows: int = 64):
    """x and a packed weight whose exact product is 0, and the size of half of it.

    The second half of x is the first one negated and shuffled, and the weight's columns follow. What comes
    out is what fp32 sums have lost; the output's rounding is relative to that and hides nothing.
    """
    half = k // 2
    generator = torch.Generator().manual_seed(k)
    order = torch.randperm(half, generator=generator)
    x = torch.randn(1, half, generator=generator).to(dtype)
    q = torch.randint(0, 16, (rows, half), generator=generator, dtype=torch.uint8)
    # one scale and zero per row: its groups exchange columns
    scale = (torch.rand(rows, 1, generator=generator) + 0.5).half().repeat(1, k // ops.TILE_COLS)
    zero = (7 + torch.rand(rows, 1, generator=generator)).half().repeat(1, k // ops.TILE_COLS)
    packed = ops.pack_w4(torch.cat([q, q[:, order]], dim=1), scale, zero)
    weight = (q.double() - zero[:, :1].double()) * scale[:, :1].double()
    return torch.cat([x, -x[:, order]], dim=1), packed, (x.double() @ weight.T).norm().item()


def magic_error(k: int, dtype: torch.dtype, linear_w4=ops.linear_w4, device: str = "cuda") -> float:
    """What is left of a product that is exactly 0, relative to its halves."""
    with torch.device("cpu"):
        x, packed, size = cancelling_product(k, dtype)
    out = linear_w4(x.to(device), packed.to(device), 64)
    return out.double().norm().item() / size


def check_magic() -> dict:
    worst = {dtype: max(magic_error(k, dtype) for k in (2048, 8192, 14336)) for dtype in MAGIC_LIMITS}
    return magic_found(worst)


def magic_found(worst: dict[torch.dtype, float]) -> dict:
    said = [
        f"{str(dtype).removeprefix('torch.')} {error:.1e} of at most {MAGIC_LIMITS[dtype]:.1e}"
        for dtype, error in worst.items()
    ]
    return {
        "ok": all(error < MAGIC_LIMITS[dtype] for dtype, error in worst.items()),  # NaN is not
        "text": f"relative error of W4 sums: {', '.join(said)}",
        "relative_errors": {str(dtype): error for dtype, error in worst.items()},
    }


def check_ring() -> dict:
    for configuration in filter(ring.fitting, ring.LIKELY):
        for mode in ("none", "prefetch"):
            ring.verify(configuration, mode)
    best, copied = ring.best_of_likely(), ring.copy_gb_s(5)
    text = f"{best['gb_s']:.0f} GB/s read-only ({best['stages']} x {best['stage_bytes']} bytes), "
    return {
        "ok": True, "ceiling_gb_s": best["gb_s"], "torch_copy_gb_s": copied,
        "text": text + f"torch's copy {copied:.0f}",
    }  # fmt: skip


def main() -> None:
    p = gpu.parser(__doc__.splitlines()[0])
    p.add_argument("checks", nargs="*", metavar="CHECK", help=f"{', '.join(CHECKS)} (default: all)")
    args = p.parse_args()
    if unknown := [name for name in args.checks if name not in CHECKS]:
        p.error(f"no check {unknown[0]!r}; accepted: {', '.join(CHECKS)}")
    gpu.require_cuda()
    torch.set_default_device("cuda")
    results, failed = gpu.Results("check", args), []
    for name in args.checks or CHECKS:
        start = time.perf_counter()
        try:
            found = globals()[f"check_{name}"]()
        except (Exception, SystemExit) as error:  # the others are still worth knowing
            found = {"ok": False, "text": (str(error).splitlines() or [repr(error)])[0]}
        seconds = round(time.perf_counter() - start, 2)
        text = f"{name}: {'ok' if found['ok'] else 'FAILED'}: {found['text']}"
        results("check", text, check=name, seconds=seconds, **found)
        failed += [] if found["ok"] else [name]
    if failed:
        raise SystemExit(f"check: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
