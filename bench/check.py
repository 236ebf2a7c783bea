"""What must be known of a GPU before anything else is measured on it, in less than a minute.

runtime     the static CUDA runtime of the extension works beside torch's
stream      an op runs on torch's current stream, and in a capture on the captured one
ring        the read-only ceiling, quickly (bench/ring.py sweeps)
boundary    between two dependent kernels in a graph, plain and with dependent launch (bench/chain.py)
magic       the fp32 sums of W4 products are as exact as the format promises, the magic constant included
"""

import ctypes
import subprocess
import time

import chain
import gpu
import ring
import torch

from river_ext import ops

# Relative errors of the sums, ten times what the format promises; the output's own rounding is apart.
MAGIC_LIMITS = {torch.bfloat16: 2e-5, torch.float16: 2.3e-4}
SLEEP_CYCLES = 200_000_000  # about 0.1 s


def check_runtime() -> dict:
    """torch first, then our ops, then torch again, all on one context; errors must not leak either way."""
    x, weight = torch.randn(1, 2048).bfloat16(), gpu.dense_weight(2048, 2048)
    expected = x.double() @ weight.double().T
    error = gpu.relative_error(ops.linear(x, weight), expected)
    refused = ""
    try:
        ops.linear(x, weight.cpu())
    except RuntimeError as refusal:
        refused = str(refusal)
    after = gpu.relative_error(x @ weight.T, expected)
    libraries = subprocess.run(["ldd", ops._C.__file__], capture_output=True, text=True).stdout
    return {
        "ok": error < 1e-2 and after < 1e-2 and bool(refused), "relative_error": error, "refusal": refused,
        "links_libcudart": "libcudart" in libraries, "image": ops._C.cuda_image(),
    }  # fmt: skip


def check_stream() -> dict:
    """On a side stream that is held up, an op must see what the stream was given before it."""
    weight = gpu.dense_weight(512, 512)
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
    return {
        "ok": side and replayed and held_up, "side_stream": side, "stream_was_held_up": held_up,
        "graph_replay": replayed,
    }  # fmt: skip


def check_ring() -> dict:
    for configuration in filter(ring.fitting, ring.LIKELY):
        for mode in ("none", "prefetch"):
            ring.verify(configuration, mode)
    return {"ok": True, "ceiling_gb_s": ring.ceiling(), "torch_copy_gb_s": ring.copy_gb_s(5)}


def check_boundary(ceiling: float) -> dict:
    lines = chain.measure_chains(ceiling, (2048, 4096), repeats=5)
    edges = {mode: programmatic_edges(mode) for mode in chain.MODES}
    early = [edges[mode].get("programmatic") for mode in ("launch", "prefetch")]
    kept = torch.cuda.get_device_capability() < (9, 0) or 0 not in early  # None: could not be read
    return {
        "ok": kept, "chains": lines, "intercepts": chain.intercepts(lines), "tiny": chain.measure_tiny(5),
        "programmatic_edges": edges,
    }  # fmt: skip


class EdgeData(ctypes.Structure):
    """CUgraphEdgeData of the driver; type 1 = programmatic."""

    _fields_ = [
        ("from_port", ctypes.c_ubyte), ("to_port", ctypes.c_ubyte), ("type", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte * 5),
    ]  # fmt: skip


def programmatic_edges(mode: str) -> dict:
    """Edges of a captured chain, and how many of them let a kernel start early: a capture may drop that."""
    x, weight = torch.randn(1, 2048).bfloat16(), gpu.dense_weight(2048, 2048)

    def run() -> None:
        out = x
        for _ in range(8):
            out = ops.linear(out, weight)

    try:
        with gpu.overlap(mode):
            graph = gpu.capture(run, keep_graph=True)
        driver = ctypes.CDLL("libcuda.so.1")
        ask = driver.cuGraphGetEdges_v2
        handle, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t(0)
        if status := ask(handle, None, None, None, ctypes.byref(count)):
            return {"not_run": f"cuGraphGetEdges_v2: error {status}"}
        nodes = [(ctypes.c_void_p * count.value)() for _ in range(2)]
        data = (EdgeData * count.value)()
        if status := ask(handle, *nodes, data, ctypes.byref(count)):
            return {"not_run": f"cuGraphGetEdges_v2: error {status}"}
    except (AttributeError, OSError, RuntimeError, TypeError) as error:
        return {"not_run": str(error).splitlines()[0]}
    found = {"edges": count.value, "programmatic": sum(edge.type == 1 for edge in data)}
    print(f"boundary: {mode}: {found['programmatic']} of {found['edges']} edges are programmatic", flush=True)
    return found


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
    errors = {
        f"{str(dtype).removeprefix('torch.')} K={k}": (magic_error(k, dtype), limit)
        for dtype, limit in MAGIC_LIMITS.items()
        for k in (2048, 8192, 14336)
    }
    for name, (error, limit) in errors.items():
        print(f"magic: {name}: relative error {error:.1e}, limit {limit:.1e}", flush=True)
    return {
        "ok": all(error < limit for error, limit in errors.values()),
        "relative_errors": {name: error for name, (error, _) in errors.items()},
    }


def main() -> None:
    p = gpu.parser(__doc__.splitlines()[0])
    args = p.parse_args()
    gpu.require_cuda()
    torch.set_default_device("cuda")
    results = {}
    for name in ("runtime", "stream", "ring", "boundary", "magic"):
        start = time.perf_counter()
        try:
            if name == "boundary":
                found = check_boundary(results["ring"].get("ceiling_gb_s") or float("inf"))
            else:
                found = globals()[f"check_{name}"]()
        except (Exception, SystemExit) as error:  # the others are still worth knowing
            found = {"ok": False, "error": str(error).splitlines()[0] if str(error) else repr(error)}
        results[name] = found | {"seconds": round(time.perf_counter() - start, 2)}
        print(f"{name}: {'ok' if found['ok'] else 'FAILED'} {found.get('error', '')}", flush=True)
    gpu.save("check", args, {"checks": results})
    if failed := [name for name, found in results.items() if not found["ok"]]:
        raise SystemExit(f"check: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
