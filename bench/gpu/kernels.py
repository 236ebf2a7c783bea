"""Every kernel on the shapes of Llama-3.2-1B and Llama-3.1-8B, random weights, cold caches.

Linears: us | GB/s of weights | % of the ring's ceiling | x torch (cuBLAS) | x torch._weight_int4pack_mm |
x a short Triton W4 GEMV, on the same shape in the same run. Then whole layers, the head, attention and the
similarity, against the same in plain torch. Over 1: ours is faster.
"""

from functools import partial

import torch

from bench.gpu import ring
from bench.lib import clocks, gpu, variants
from bench.lib.gpu import Time
from bench.lib.models import CONFIGS, LAYER_SHAPES, layer_bytes
from bench.lib.peers import TorchStep
from bench.lib.weights import dense_weight, packed_weight, random_network
from river_ext import ops
from river_ext.engine.network import Layer, Network, Place

INNER_K_TILES = 8  # of torch's int4 format
VERIFIED = 5  # rows of one slot that share its cache: a verification of four drafts
SMALL = 64  # pairs of vectors of the similarity


class Report:
    """A line per result and design. A peer that is None was not measured."""

    def __init__(self, results: gpu.Results, ceiling: float, designs: list[str]):
        self.results, self.ceiling, self.designs, self.not_run = results, ceiling, designs, []

    def time(self, call, items: list, size: float, repeats: int) -> dict[str, Time]:
        """Of a kernel of ours, by design."""
        return variants.time_rotated(self.designs, call, items, size, repeats)

    def __call__(
        self, kernel, shape, rows: int, size: int, times: dict[str, Time], peers: dict, **more
    ) -> None:
        for design, time in times.items():
            rate = size / time.us / 1e3
            percent = 100 * rate / self.ceiling
            line = {"kernel": kernel, "shape": shape, "rows": rows, "variant": design, **more}
            line |= time.fields()
            line |= {"bytes": size, "gb_s": rate, "percent_of_ceiling": percent}
            line |= {f"{name}_us": peer and peer.us for name, peer in peers.items()}
            line |= {f"x_{name}": peer and peer.us / time.us for name, peer in peers.items()}
            text = "  ".join(f"{peer.us / time.us:5.2f} x {name}" for name, peer in peers.items() if peer)
            self.results(
                "kernel",
                f"{kernel:<16} {shape:<12} T={rows} {design:<16} {time.us:8.2f} us {rate:6.0f} GB/s "
                f"{percent:4.0f} %  {text}  (spread {time.spread_percent:.1f} %)",
                **line,
            )

    def attempt(self, what: str, measure):
        """A peer that does not run here is recorded as not run."""
        try:
            return measure()
        except Exception as error:  # of libraries that are not ours
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            if (what, reason) not in self.not_run:
                self.not_run.append((what, reason))
                self.results("not run", f"not run: {what}: {reason}", what=what, reason=reason)
            return None


# ---- linears ----------------------------------------------------------------------------------------


def activations(rows: int, k: int) -> torch.Tensor:
    return torch.randn(rows, k, dtype=torch.bfloat16)


def int4_weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """torch's packed weight, its scales and zeros [K/64, N, 2], and what it stands for."""
    q = torch.randint(0, 16, (n, k), dtype=torch.int32)
    scale, zero = 0.2 * k**-0.5 * torch.ones(k // 64, n), 0.01 * torch.randn(k // 64, n)
    scale_and_zero = torch.stack([scale, zero], dim=2).bfloat16()
    packed = torch._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8), INNER_K_TILES)
    scale, zero = (part.float().T[..., None] for part in scale_and_zero.unbind(2))
    return packed, scale_and_zero, ((q.view(n, -1, 64) - 8) * scale + zero).view(n, k)


def int4_linear(x: torch.Tensor, weight: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return torch._weight_int4pack_mm(x, weight[0], 64, weight[1])


def same(name: str, out: torch.Tensor, expected: torch.Tensor) -> None:
    """A fast wrong kernel would be no result."""
    error = gpu.relative_error(out, expected)
    if not error < 1e-2:
        raise RuntimeError(f"{name} differs from the reference by {error:.1e}")


def int4_weights(n: int, k: int) -> list[tuple]:
    packed, scale_and_zero, dense = int4_weight(n, k)
    x = activations(2, k)
    same("torch's int4 linear", int4_linear(x, (packed, scale_and_zero)), x.float() @ dense.T)
    return [(p, scale_and_zero.clone()) for p in gpu.rotation(packed)]


def triton_weights(n: int, k: int) -> list[tuple]:
    from bench.gpu import triton_w4

    weight = triton_w4.random_weight(n, k)
    count = gpu.copies(gpu.size_of(*weight))
    return [weight] + [tuple(t.clone() for t in weight) for _ in range(count - 1)]


def time_triton(rows: int, weights: list[tuple], repeats: int) -> Time:
    """The fastest of its configurations for this shape."""
    from bench.gpu import triton_w4

    call = partial(triton_w4.linear_w4, activations(rows, 2 * weights[0][0].shape[1]))
    size = gpu.size_of(*weights[0])
    times = [
        gpu.time_rotated(partial(call, config=config), weights, size, repeats) for config in triton_w4.CONFIGS
    ]
    return min(times, key=lambda time: time.us)


def measure_linears(report: Report, model: str, args) -> None:
    for shape, (n, k) in LAYER_SHAPES.items():
        if not shape.startswith(model):
            continue
        weights = {
            "dense": gpu.rotation(dense_weight(n, k)),
            "w4": gpu.rotation(packed_weight(n, k)),
            "int4": report.attempt("torch int4", partial(int4_weights, n, k)),
            "triton": triton_weights(n, k) if args.triton_rows else None,
        }
        for rows in args.rows:
            measure_linear(report, shape, rows, weights, args)


def measure_linear(report: Report, shape: str, rows: int, weights: dict[str, list], args) -> None:
    n, k = LAYER_SHAPES[shape]
    x = activations(rows, k)

    def time(call, items: list, measure=gpu.time_rotated):
        size = gpu.size_of(*items[0]) if isinstance(items[0], tuple) else gpu.size_of(items[0])
        return measure(call, items, size, args.repeats)

    dense, packed = weights["dense"][0], weights["w4"][0]
    same("linear", ops.linear(x, dense), x.float() @ dense.float().T)
    unpacked = ops.dequantize_w4(packed, n, k, torch.float32)
    same("linear_w4", ops.linear_w4(x, packed, n), x.float() @ unpacked.T)
    cublas = time(partial(torch.nn.functional.linear, x), weights["dense"])
    ours = time(partial(ops.linear, x), weights["dense"], report.time)
    report("linear", shape, rows, gpu.size_of(dense), ours, {"torch": cublas})
    peers = {"torch": cublas, "torch_int4": None, "triton": None}
    if weights["int4"]:
        peers["torch_int4"] = report.attempt(
            "torch int4", lambda: time(partial(int4_linear, x), weights["int4"])
        )
    if weights["triton"] and rows in args.triton_rows:
        peers["triton"] = report.attempt(
            "triton W4", lambda: time_triton(rows, weights["triton"], args.repeats)
        )
    ours = time(partial(ops.linear_w4, x, out_features=n), weights["w4"], report.time)
    report("linear_w4", shape, rows, gpu.size_of(packed), ours, peers)


# ---- the rest ---------------------------------------------------------------------------------------


def measure_layers(report: Report, model: str, args) -> None:
    network = random_network(CONFIGS[model])
    for rows in args.rows:
        measure_layers_at(report, model, network, rows, args.repeats)


@torch.inference_mode()
def measure_layers_at(report: Report, model: str, network: Network, rows: int, repeats: int) -> None:
    """decoder_block and exit_layer at context 1k, over the layers of a network."""
    context, config = 1024, network.config
    plain = TorchStep(network, rows, context)
    slots, positions = torch.arange(rows, dtype=torch.int32), torch.full((rows,), context, dtype=torch.int32)
    place = Place(plain.cache, slots, positions, network.rope(context + 1))
    hidden = activations(rows, config.hidden_size)
    dense, packed = layer_bytes(config)
    cache = rows * (context + 1) * 4 * config.num_key_value_heads * config.head_dim
    layers = range(config.num_hidden_layers)
    peer = gpu.time_rotated(lambda index: plain.layer(index, hidden), layers, dense + cache, repeats)
    for name, path, size in (
        ("decoder_block", Layer.block, dense + cache),
        ("exit_layer", Layer.exit, packed + cache),
    ):
        ours = report.time(lambda layer, path=path: path(layer, hidden, place), network.layers, size, repeats)
        report(name, model, rows, size, ours, {"torch": peer}, context=context)


def measure_head(report: Report, model: str, args) -> None:
    config = CONFIGS[model]
    shape = config.vocab_size, config.hidden_size
    dense, packed = gpu.rotation(dense_weight(*shape)), gpu.rotation(packed_weight(*shape))
    norm, eps = torch.ones(config.hidden_size).bfloat16(), config.rms_norm_eps

    def plain(x, weight):
        x = torch.nn.functional.rms_norm(x, x.shape[1:], norm, eps)
        return torch.nn.functional.linear(x, weight).argmax(dim=1)

    def lm_head(x, weight):
        return ops.lm_head(x, norm, weight, eps, return_logits=False)

    def lm_head_w4(x, weight):
        return ops.lm_head_w4(x, norm, weight, config.vocab_size, eps, return_logits=False)

    for rows in args.rows:
        x = activations(rows, config.hidden_size)
        peer = gpu.time_rotated(partial(plain, x), dense, gpu.size_of(dense[0]), args.repeats)
        for ours, weights in ((lm_head, dense), (lm_head_w4, packed)):
            size = gpu.size_of(weights[0])
            time = report.time(partial(ours, x), weights, size, args.repeats)
            report(ours.__name__, model, rows, size, time, {"torch": peer})


def measure_attention(report: Report, model: str, args) -> None:
    for context in args.contexts:
        for rows in args.rows:
            measure_attention_at(report, model, context, rows, 1, args.repeats)
        measure_attention_at(report, model, context, 1, VERIFIED, args.repeats)


def measure_attention_at(
    report: Report, model: str, context: int, slots: int, per_slot: int, repeats: int
) -> None:
    """Rows at the last positions of each slot. Launches rotate over the slots of a large cache."""
    config, rows = CONFIGS[model], slots * per_slot
    kv_heads, head_dim = config.num_key_value_heads, config.head_dim
    size = slots * context * 4 * kv_heads * head_dim
    groups = gpu.copies(size)
    k, v = (torch.randn(groups * slots, kv_heads, context, head_dim, dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn(rows, config.num_attention_heads, head_dim, dtype=torch.bfloat16)
    places = torch.arange(groups * slots, dtype=torch.int32).repeat_interleave(per_slot).split(rows)
    ends = torch.arange(context - per_slot, context, dtype=torch.int32)
    positions = ends.repeat(slots)
    mask = torch.arange(context) <= ends[:, None] if per_slot > 1 else None

    def plain(pair, query=query):
        by_slot = query.view(slots, per_slot, -1, head_dim).transpose(1, 2)
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(by_slot, *pair, attn_mask=mask, enable_gqa=True)

    def ours(some):
        return ops.decode_attention(query, k, v, some, positions)

    pairs = list(zip(k.split(slots), v.split(slots), strict=True))
    expected = plain([part.float() for part in pairs[1]], query.float())
    same("decode_attention", ours(places[1]), expected.transpose(1, 2).flatten(0, 1))
    time = report.time(ours, places, size, repeats)
    peer = report.attempt("torch attention", lambda: gpu.time_rotated(plain, pairs, size, repeats))
    more = {"context": context, "rows_of_a_slot": per_slot, "working_set_bytes": groups * size}
    report("decode_attention", f"{model} {context}", rows, size, time, {"torch": peer}, **more)


def measure_similarity(report: Report, model: str, args) -> None:
    """Small enough that its data is never the point: one launch after another, from the cache."""
    hidden_size = CONFIGS[model].hidden_size

    def ours(pair):
        return ops.state_similarity(*pair)

    def plain(pair):
        return torch.nn.functional.cosine_similarity(pair[0].float(), pair[1].float())

    for rows in args.rows:
        pairs = [tuple(activations(rows, hidden_size) for _ in range(2)) for _ in range(SMALL)]
        size = gpu.size_of(*pairs[0])
        peer = gpu.time_rotated(plain, pairs, size, args.repeats)
        time = report.time(ours, pairs, size, args.repeats)
        report("state_similarity", model, rows, size, time, {"torch": peer}, working_set_bytes=SMALL * size)


KERNELS = {
    "linears": measure_linears,
    "layers": measure_layers,
    "lm_head": measure_head,
    "decode_attention": measure_attention,
    "state_similarity": measure_similarity,
}


def main() -> None:
    p = gpu.parser(__doc__.splitlines()[0])
    p.add_argument("--rows", type=int, nargs="+", choices=[1, 2, 4, 8], default=[1, 2, 4, 8])
    p.add_argument("--contexts", type=int, nargs="+", default=[32, 1024, 8192])
    p.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    p.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    p.add_argument("--triton-rows", type=int, nargs="+", default=[1, 8])
    p.add_argument("--repeats", type=int, default=5)
    variants.add_argument(p)
    args = p.parse_args()
    if args.quick:
        args.rows, args.triton_rows, args.repeats = [1], [1], 3
    gpu.require_cuda()
    torch.set_default_device("cuda")
    results = gpu.Results("kernels", args)
    report = Report(results, ring.ceiling(results), variants.designs(args))
    if report.attempt("triton W4", check_triton) is None:
        args.triton_rows = []
    for model in args.models:
        for name, measure in KERNELS.items():
            if name in args.kernels:
                measure(report, model, args)
    results("clocks", **clocks.under_load(clocks.streaming_graph()))


def check_triton() -> float:
    from bench.gpu import triton_w4

    error = triton_w4.check()
    print(f"triton W4: relative error {error:.1e}", flush=True)
    return error


if __name__ == "__main__":
    main()
