"""Registration: every op passes opcheck and traces into one graph; the schemas that later work relies on."""

import pytest
import torch
from blocks import SHAPES, Block, int32
from cycles import Requests
from drawing import drawing
from test_advance import State
from test_dual_layer import Decision, weights_of
from torch._subclasses.fake_tensor import FakeTensorMode

from river_cli import info
from river_ext import ops, reference

HAS_CUDA = ops._C.build_info()["cuda"]


def samples():
    block = Block(SHAPES["partial rotary, bias, multiplier"], torch.bfloat16)
    s, d, p = block.shape, block.dense, block.packed
    hidden, (k, v) = block.random(2, s.hidden_size), block.caches()
    tail = (k, v, int32([0, -1]), int32([5, 0]), *block.tables, s.num_attention_heads, 1e-5)
    norm1, norm2 = block.norms
    q, scale, zero = block.quantised(40, 100)
    packed = ops.pack_w4(q, scale, zero)
    x = block.random(3, 100)
    return {
        "decoder_block": (
            hidden, norm1, d["q_proj"], d["k_proj"], d["v_proj"], d["o_proj"], norm2, d["gate_proj"],
            d["up_proj"], d["down_proj"], *tail, block.options["q_bias"],
        ),
        "exit_layer": (hidden, norm1, p.qkv_proj, p.o_proj, norm2, p.gate_up_proj, p.down_proj, *tail),
        "dual_layer": (
            1, hidden, block.random(2, s.hidden_size), *vars(Decision(2, 0.5)).values(), *weights_of(block),
            *tail, block.options["q_bias"],
        ),
        "advance": tuple(vars(State()).values()),
        "draft_advance": tuple(Requests().drafting(torch.tensor([3, 4]), 1).values()),
        "accept": tuple(Requests().accepting(torch.tensor([3, 4, 5, 6])).values()),
        "decode_attention": (block.random(2, 4, 32), k, v, int32([0, 1]), int32([5, 7]), 0.2, 3, None),
        "state_similarity": (hidden, hidden.flip(0)),
        "lm_head": (hidden, norm1, block.random(50, 128), 1e-5, True),
        "lm_head_w4": (hidden, norm1, ops.pack_w4(*block.quantised(50, 128)), 50, 1e-5, True),
        "sample": tuple(drawing(block.random(2, 50).float(), top_k=9, top_p=0.9, min_p=0.01).values()),
        "linear": (x, block.random(40, 100), None),
        "linear_w4": (x, packed, 40, block.random(40)),
        "pack_w4": (q, scale, zero),
        "unpack_w4": (packed, 40, 100, 64),
        "dequantize_w4": (packed, 40, 100, torch.bfloat16),
    }  # fmt: skip


SAMPLES = samples()
RECORDS = {"advance": 13, "accept": 14}  # the place of records among the arguments


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.river, name).default, SAMPLES[name])


def on_copies(op, arguments):
    """What op returns and leaves in its arguments, for copies of them."""
    arguments = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    result = op(*arguments)
    results = result if isinstance(result, tuple) else (result,)
    return [a for a in (*results, *arguments) if isinstance(a, torch.Tensor)]


@pytest.mark.parametrize("name", SAMPLES)
def test_full_graph(name):
    torch.compiler.reset()  # else the graphs of this one lambda count as recompilations
    op = getattr(torch.ops.river, name)
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    for got, expected in zip(on_copies(compiled, SAMPLES[name]), on_copies(op, SAMPLES[name]), strict=True):
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("name", SAMPLES)
def test_cuda_tensors_trace_without_a_gpu(name):
    """What torch.compile sees of a GPU: the fake kernels, with `records` in the memory of the host."""
    with FakeTensorMode() as mode:
        on_cpu = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in SAMPLES[name]]
        on_cuda = [torch.empty_like(a, device="cuda") if isinstance(a, torch.Tensor) else a for a in on_cpu]
        if name in RECORDS:
            on_cuda[RECORDS[name]] = on_cpu[RECORDS[name]]
        result = getattr(torch.ops.river, name)(*on_cuda)
        expected = getattr(torch.ops.river, name)(*on_cpu)
    for got, like in zip(*(r if isinstance(r, tuple) else (r,) for r in (result, expected)), strict=True):
        if like is not None:
            assert got.device.type == "cuda" and (got.shape, got.dtype) == (like.shape, like.dtype)
            assert got.is_contiguous()


@pytest.mark.parametrize("name", RECORDS)
def test_records_on_the_gpu_are_refused(name):
    with FakeTensorMode() as mode:
        arguments = [torch.empty_like(mode.from_tensor(a), device="cuda") for a in SAMPLES[name]]
        with pytest.raises(RuntimeError, match=f"river::{name}: records is on cuda.*, expected cpu"):
            getattr(torch.ops.river, name)(*arguments)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_op_is_registered_for_the_devices_of_the_build(name):
    for key, expected in ("CPU", True), ("CUDA", HAS_CUDA):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"river::{name}", key) == expected


def test_what_info_says_of_a_gpu():
    compiled = info._compiled({"cuda_archs": "8.0;8.6;9.0+PTX;10.0a"})
    assert compiled == ["sm_80", "sm_86", "sm_90a", "compute_90", "sm_100a"]
    for arch, code, ptx, text in [
        ("sm_90", 90, 90, "machine code for sm_90a"),
        ("sm_87", 86, 86, "machine code for sm_86"),
        ("sm_120", 120, 90, "PTX for compute_90, compiled by the driver"),
        ("sm_75", None, None, f"no kernels for sm_75: compiled for {', '.join(compiled)}"),
    ]:
        assert info._runs(arch, {"code": code, "ptx": ptx}, compiled) == text


def test_overlap():
    with pytest.raises(ValueError, match="overlap is 'some', expected none, launch or prefetch"):
        ops._C.set_overlap("some")
    before = ops._C.set_overlap("none")
    assert before == "launch"
    assert [ops._C.set_overlap(name) for name in ("prefetch", "launch")] == ["none", "prefetch"]


def test_inductor_compiles_around_a_mutating_op():
    block = Block(SHAPES["gqa"], torch.float32)
    hidden, caches = block.random(2, 128), block.caches()
    place = int32([0, 1]), int32([5, 7])

    def step(hidden, k, v):
        out, similarity = block.run(ops, "decoder_block", hidden * 2, (k, v), *place)
        return out + 1, similarity

    own = [c.clone() for c in caches]
    out, similarity = torch.compile(step, fullgraph=True)(hidden, *own)
    expected, expected_similarity = step(hidden, *caches)
    assert torch.allclose(out, expected) and torch.allclose(similarity, expected_similarity)
    assert all(torch.equal(a, b) for a, b in zip(own, caches, strict=True))


def test_importing_the_package_registers_the_ops():
    import subprocess
    import sys

    code = (
        "import torch, river_ext; x = torch.ones(1, 16); print(torch.ops.river.state_similarity(x, x).item())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "1.0"


def test_every_op_has_a_wrapper_and_a_reference():
    registered = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("river::")}  # fmt: skip
    assert registered == set(SAMPLES)
    for name in registered:
        assert callable(getattr(ops, name)) and callable(getattr(reference, name))


def test_a_tensor_without_data_is_refused():
    """With one argument on another device torch takes the fake kernel, which must not invent a result."""
    for name, arguments in SAMPLES.items():
        tensors = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
        for index in tensors if len(tensors) > 1 else []:
            changed = list(arguments)
            changed[index] = changed[index].to("meta")
            with pytest.raises(RuntimeError, match="expected one device|expected cpu"):
                getattr(torch.ops.river, name)(*changed)


def test_extreme_numbers_are_refused():
    block = Block(SHAPES["gqa"], torch.float32)
    place = torch.zeros(1, 128), block.caches(), int32([0]), int32([0])
    with pytest.raises(RuntimeError, match="softmax_scale is 1e\\+300, expected a finite number"):
        block.run(ops, "decoder_block", *place, softmax_scale=1e300)
    packed = torch.zeros(1, 2, 576, dtype=torch.uint8)
    assert ops.unpack_w4(packed, 16, 128, 2**63 - 64)[1].shape == (16, 1)
    q, scale, zero = block.quantised(16, 64)
    scale[3, 0] = float("inf")
    with pytest.raises(RuntimeError, match=r"scale\[3, 0\] is not finite"):
        ops.pack_w4(q, scale, zero)


@pytest.mark.parametrize("dtype", [63, 10**6, "float32", None, torch.strided])
def test_a_dtype_that_is_none(dtype):
    """torch reads past a table of its own for numbers that are no dtypes."""
    packed = torch.zeros(3, 2, 576, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="^river::dequantize_w4: dtype is .*, expected torch.dtype$"):
        ops.dequantize_w4(packed, 40, 100, dtype)
