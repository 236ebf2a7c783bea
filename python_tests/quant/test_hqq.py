"""HQQ: its error against the hqq package and round-to-nearest, its edges, and what it refuses."""

import importlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import river_ext
from river_ext import ops
from river_ext.errors import RiverError
from river_ext.quant import hqq

DEMO = Path(river_ext.__file__).parent / "demo"
DEMO_WEIGHTS = [
    f"model.layers.{layer}.{name}.weight"
    for layer in (0, 15)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
]
RANDOM = {
    "gaussian": lambda size: 0.02 * torch.randn(size),
    "gaussian, bfloat16": lambda size: (0.02 * torch.randn(size)).bfloat16(),
    "gaussian, wide": torch.randn,
    "gaussian, very wide": lambda size: 50 * torch.randn(size),
    "student t, 2": lambda size: 0.02 * torch.distributions.StudentT(2.0).sample(size),
    "student t, 3": lambda size: 0.02 * torch.distributions.StudentT(3.0).sample(size),
    "student t, 3, wide": lambda size: torch.distributions.StudentT(3.0).sample(size),
    "uniform": torch.rand,
    "off zero": lambda size: 1 + 0.02 * torch.randn(size),
}


def weight_of(kind):
    if kind in RANDOM:
        torch.manual_seed(sum(map(ord, kind)))
        return RANDOM[kind]((128, 1024))
    with safe_open(DEMO / "model.safetensors", framework="pt") as file:
        return file.get_tensor(kind)


def dequantized(q, scale, zero, group_size):
    scale, zero = (m.float().repeat_interleave(group_size, 1)[:, : q.shape[1]] for m in (scale, zero))
    return (q.float() - zero) * scale


def squared_error(weight, approximation):
    return (weight.double() - approximation.reshape(weight.shape).double()).square().mean().item()


def our_error(weight, group_size, **options):
    return squared_error(weight, dequantized(*hqq.quantize(weight, group_size, **options), group_size))


def round_to_nearest(weight, group_size):
    groups = weight.float().view(-1, group_size)
    low, high = groups.aminmax(dim=1, keepdim=True)
    scale = (high - low) / 15
    return ((groups - low) / scale).round() * scale + low


def hqq_package(weight, group_size):
    try:
        quantizer = importlib.import_module("hqq.core.quantize").Quantizer
    except ImportError as error:
        pytest.skip(f"the hqq package, a yardstick, is not installed ({error})")
    q, meta = quantizer.quantize(
        weight.float(), nbits=4, group_size=group_size, axis=1, bitpack=False, device="cpu"
    )
    return (q.float() - meta["zero"]) * meta["scale"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # the package's own
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("kind", [*RANDOM, *DEMO_WEIGHTS])
def test_error_is_no_worse_than_the_hqq_package(kind, group_size):
    weight = weight_of(kind)
    theirs = squared_error(weight, hqq_package(weight, group_size))
    assert our_error(weight, group_size) <= 1.01 * theirs


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("kind", [*RANDOM, *DEMO_WEIGHTS])
def test_error_is_no_worse_than_round_to_nearest(kind, group_size):
    weight = weight_of(kind)
    assert our_error(weight, group_size) <= squared_error(weight, round_to_nearest(weight, group_size))


def test_refinement_pays():
    weight = weight_of("gaussian")
    assert our_error(weight, 64) < 0.95 * our_error(weight, 64, iterations=1)


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("size", [(5, 64), (16, 130), (3, 40), (7, 320), (1, 1)])
def test_shapes_dtypes_and_ragged_groups(size, group_size):
    torch.manual_seed(0)
    weight = torch.randn(size)
    q, scale, zero = hqq.quantize(weight, group_size)
    groups = -(-size[1] // group_size)
    assert (q.shape, scale.shape, zero.shape) == (size, (size[0], groups), (size[0], groups))
    assert (q.dtype, scale.dtype, zero.dtype) == (torch.uint8, torch.float16, torch.float16)
    assert q.max() <= 15 and (scale > 0).all()
    # the last group is quantised by its real columns alone
    full = (groups - 1) * group_size
    for part, alone in zip(
        (q[:, full:], scale[:, -1:], zero[:, -1:]), hqq.quantize(weight[:, full:]), strict=True
    ):
        assert torch.equal(part, alone)
    # and it is what the packed form holds
    dense = ops.dequantize_w4(ops.pack_w4(q, scale, zero), *size, torch.float32)
    assert torch.equal(dense, dequantized(q, scale, zero, group_size))


def test_q_is_computed_from_the_rounded_scale_and_zero():
    weight = weight_of("student t, 3")
    q, scale, zero = hqq.quantize(weight)
    scale, zero = (m.float().repeat_interleave(64, 1) for m in (scale, zero))
    assert torch.equal(q.float(), (weight / scale + zero).round().clamp(0, 15))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_deterministic_and_independent_of_blocks_and_threads(monkeypatch, two_threads):
    weight = weight_of("student t, 3, wide")
    expected = hqq.quantize(weight)
    few = hqq.quantize(weight[40:50])
    monkeypatch.setitem(hqq.WEIGHTS_AT_A_TIME, "cpu", 1)  # one row at a time
    by_row = hqq.quantize(weight)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    single = hqq.quantize(weight)
    for part, others in zip(expected, zip(by_row, single, strict=True), strict=True):
        assert all(torch.equal(part, other) for other in others)
    assert all(torch.equal(part[40:50], rows) for part, rows in zip(expected, few, strict=True))


def test_parameters_and_transposed_weights():
    weight = weight_of("gaussian")
    parameter = torch.nn.Parameter(weight.T.contiguous())
    for part, other in zip(hqq.quantize(weight), hqq.quantize(parameter.T), strict=True):
        assert torch.equal(part, other) and not other.requires_grad


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.3, -1e-3, 2.5e-5, 1e-6, 3e4, -65504.0, 1e6])
def test_constant_groups_are_met_exactly(value):
    if abs(value) < 65504:  # alone as well
        weight = torch.full((3, 100), value).bfloat16()
        assert torch.equal(dequantized(*hqq.quantize(weight), 64), weight.float())
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.full((3, 100), value, dtype=dtype)
        weight[1] = torch.randn(100)
        approximation = dequantized(*hqq.quantize(weight), 64)
        tolerance = 0 if dtype == torch.bfloat16 else abs(value) * 2**-11
        assert (approximation - weight.float())[[0, 2]].abs().max() <= tolerance


def test_narrow_groups_far_from_zero():
    torch.manual_seed(0)
    weight = 1 + 1e-5 * torch.randn(4, 64)  # 16 levels in that range would need a zero of about -4e5
    assert (dequantized(*hqq.quantize(weight), 64) - weight).abs().max() <= 2**-10


def test_a_dead_group_does_not_spoil_a_weight():
    weight = weight_of("gaussian")
    weight[3, :64] *= 1e-12
    q, scale, zero = hqq.quantize(weight)
    assert (dequantized(q, scale, zero, 64) - weight)[3, :64].abs().max() <= 2**-24


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-12, 1e-9, 6e-8, 1e-7, 1e-6, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_that_are_nearly_zero(size, dtype):
    """Whole matrices as well: layers that were initialised to nothing, or have decayed to it."""
    weight = (size * weight_of("gaussian, wide")).to(dtype)
    q, scale, zero = hqq.quantize(weight)
    approximation = dequantized(q, scale, zero, 64)
    assert scale.isfinite().all() and (scale > 0).all() and zero.isfinite().all()
    error = (approximation - weight.float()).abs().max()
    assert error <= 2**-24 + 0.25 * size, error
    if size == 0:
        assert (approximation == 0).all()
    packed = ops.dequantize_w4(ops.pack_w4(q, scale, zero), *weight.shape, torch.float32)
    assert torch.equal(packed, approximation)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((2, 64), torch.nan), "w holds NaN or Inf in row 0; finite values"),
        (torch.tensor([[1.0, 2.0], [1.0, -torch.inf]]), "w holds NaN or Inf in row 1; finite values"),
        (1e7 * torch.randn(2, 64), "w needs a scale above 65504, the largest in fp16, in row 0"),
        (torch.full((2, 64), 3e8), "w needs a scale above 65504"),
        (torch.tensor([[3e38, -3e38]]), "w needs a scale above 65504"),
        (
            torch.cat([torch.randn(1, 64), torch.full((1, 64), 3e8)]),
            "w needs a scale above 65504, the largest in fp16, in row 1",
        ),
        (torch.tensor([[torch.inf] * 3]), "w holds NaN or Inf in row 0; finite values"),
        (torch.ones(64), r"w is float32 \[64\]; a float matrix"),
        (torch.ones(0, 64), r"w is float32 \[0, 64\]; a float matrix"),
        (torch.ones(2, 64, dtype=torch.int8), r"w is int8 \[2, 64\]; a float matrix"),
    ],
)
def test_refused_weights(weight, message):
    with pytest.raises(RiverError, match=message) as error:
        hqq.quantize(weight, name="w")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("group_size", [0, 32, 96, 256])
def test_refused_group_sizes(group_size):
    with pytest.raises(RiverError, match=f"group size {group_size} is not supported; accepted: 64, 128"):
        hqq.quantize(torch.ones(2, 64), group_size)


def test_public_name():
    assert river_ext.quantize is hqq.quantize
