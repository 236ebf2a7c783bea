"""What torch is told of the ops beside their kernels: no gradients, and errors that name an argument."""

import pytest
import torch
from test_ops import SAMPLES
from torch.autograd import forward_ad

from river_ext import ops

FLOATING = {
    name: [i for i, a in enumerate(values) if isinstance(a, torch.Tensor) and a.is_floating_point()]
    for name, values in SAMPLES.items()
}
ENDS_OF_STEPS = ("advance", "draft_advance", "accept")
RETURNS_FLOATS = [
    name for name in SAMPLES if name not in (*ENDS_OF_STEPS, "pack_w4", "unpack_w4", "dequantize_w4")
]


def schema(name):
    return getattr(torch.ops.river, name).default._schema


def is_written(argument):
    return argument.alias_info is not None and argument.alias_info.is_write


def copies(name, requires_grad=None):
    values = [v.clone() if isinstance(v, torch.Tensor) else v for v in SAMPLES[name]]
    if requires_grad is not None:
        values[requires_grad].requires_grad_()
    return values


def call(op, values):
    result = op(*values)
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]


@pytest.mark.parametrize("name", RETURNS_FLOATS)
def test_backward_raises(name):
    op, arguments = getattr(torch.ops.river, name), schema(name).arguments
    expected = call(op, copies(name))
    for i in FLOATING[name]:
        if is_written(arguments[i]):
            continue
        outputs = call(op, copies(name, i))
        for output, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(output.detach().nan_to_num(), wanted.nan_to_num())
        claims = [output for output in outputs if output.requires_grad]
        assert claims == [output for output in outputs if output.is_floating_point()] != []
        for output in claims:
            with pytest.raises(RuntimeError, match=f"river::{name} has no gradient"):
                output.sum().backward(retain_graph=True)


@pytest.mark.parametrize("name", SAMPLES)
def test_what_is_written_must_not_require_grad(name):
    for i, argument in enumerate(schema(name).arguments[: len(SAMPLES[name])]):
        if is_written(argument) and i in FLOATING[name]:
            values = copies(name, i)
            before = values[i].detach().clone()
            with pytest.raises(
                RuntimeError, match=f"{name}: {argument.name} requires grad, and is written in place"
            ):
                getattr(torch.ops.river, name)(*values)
            assert torch.equal(values[i].nan_to_num(), before.nan_to_num())
            with torch.no_grad():
                getattr(torch.ops.river, name)(*values)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad_nothing_claims_to_have_one(name, context):
    for i in FLOATING[name]:
        with context():
            assert not any(t.requires_grad for t in call(getattr(torch.ops.river, name), copies(name, i)))


def test_a_gradient_does_not_see_what_has_been_overwritten():
    names = [argument.name for argument in schema("decoder_block").arguments]
    values = copies("decoder_block")
    cache = values[names.index("v_cache")]
    weight = torch.ones_like(cache, requires_grad=True)
    loss = (weight * cache).sum()
    torch.ops.river.decoder_block(*values)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:Error detected in NoGradientBackward")
def test_compiled_code_has_no_gradient_either():
    x, weight = torch.randn(2, 64), torch.randn(16, 64, requires_grad=True)
    compiled = torch.compile(lambda x, w: ops.linear(x, w) * 2, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, weight), ops.linear(x, weight) * 2)
    with pytest.raises(Exception, match="river::linear has no gradient"):
        compiled(x, weight).sum().backward()


# --- values of the wrong type -------------------------------------------------------------------------------


def line_of(name, values):
    with pytest.raises(RuntimeError) as error:
        wrapper(name, values)
    assert "\n" not in str(error.value)
    return str(error.value)


def wrapper(name, values):
    """ops.name with values in the order of the schema, in which keywords come last."""
    code = getattr(ops, name).__code__
    count = code.co_argcount
    keywords = code.co_varnames[count : count + code.co_kwonlyargcount]
    return getattr(ops, name)(*values[:count], **dict(zip(keywords, values[count:], strict=False)))


@pytest.mark.parametrize("name", SAMPLES)
def test_none_for_a_tensor_names_the_argument(name):
    required = [i for i, a in enumerate(schema(name).arguments) if str(a.type) == "Tensor"]
    for i in required:
        values = copies(name)
        values[i] = None
        argument = schema(name).arguments[i].name
        assert line_of(name, values) == f"river::{name}: {argument} is None, expected a tensor"
    nothing = [None if i in required else value for i, value in enumerate(copies(name))]
    first = schema(name).arguments[required[0]].name
    assert line_of(name, nothing) == f"river::{name}: {first} is None, expected a tensor"


@pytest.mark.parametrize("name", SAMPLES)
def test_none_is_named_without_the_wrappers_too(name):
    """As long as another tensor says where the op runs."""
    required = [i for i, a in enumerate(schema(name).arguments) if str(a.type) == "Tensor"]
    for i in required if len(required) > 1 else ():
        values = copies(name)
        values[i] = None
        with pytest.raises(
            RuntimeError, match=f"^river::{name}: {schema(name).arguments[i].name} is None, expected a"
        ):
            getattr(torch.ops.river, name)(*values)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize(
    "value, text", [([1.0], "a list"), ("x", "'x'"), (3, "3"), (2**70, str(2**70)), ({}, "a dict")]
)
def test_a_value_of_another_type_names_the_argument(name, value, text):
    for i, argument in enumerate(schema(name).arguments[: len(SAMPLES[name])]):
        if not str(argument.type).endswith(("Tensor", "Tensor]")):
            continue
        values = copies(name)
        values[i] = value
        assert line_of(name, values).startswith(f"river::{name}: {argument.name} is {text}, expected ")


def test_other_arguments_and_layouts_are_named():
    x, weight = torch.ones(1, 64), torch.ones(16, 64)
    for call, line in [
        (
            lambda: ops.linear(x, weight.to_sparse()),
            "linear: weight is torch.sparse_coo, expected torch.strided",
        ),
        (lambda: ops.lm_head(x, x[0], weight, "a"), "lm_head: rms_norm_eps is 'a', expected float"),
        (lambda: ops.lm_head(x, x[0], weight, None), "lm_head: rms_norm_eps is None, expected float"),
        (
            lambda: ops.unpack_w4(torch.ones(1, 1, 576), 16.5, 64),
            "unpack_w4: out_features is 16.5, expected int",
        ),
        (lambda: ops.dequantize_w4(x, 1, 1, "int8"), "dequantize_w4: dtype is 'int8', expected torch.dtype"),
        (lambda: ops.linear(x.numpy(), weight), "linear: x is a ndarray, expected a tensor"),
    ]:
        with pytest.raises(RuntimeError) as error:
            call()
        assert str(error.value) == f"river::{line}"


@pytest.mark.parametrize("name", SAMPLES)
def test_wrappers_give_what_the_ops_give(name):
    got, expected = wrapper(name, copies(name)), getattr(torch.ops.river, name)(*copies(name))
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, expected)), strict=True):
        assert a is b is None or torch.equal(a.nan_to_num(), b.nan_to_num())


def test_none_for_what_is_written_beside_an_input_that_requires_grad():
    """The op itself says what is missing."""
    values = list(SAMPLES["decoder_block"])
    values[0] = values[0].clone().requires_grad_()
    k_cache = [argument.name for argument in schema("decoder_block").arguments].index("k_cache")
    values[k_cache] = None
    with pytest.raises(RuntimeError, match="river::decoder_block: k_cache is None"):
        torch.ops.river.decoder_block(*values)


@pytest.mark.parametrize("name", ["linear", "state_similarity", "decoder_block"])
def test_tangents_are_refused(name):
    """Forward-mode differentiation would go on with a derivative of zero."""
    op, values = getattr(torch.ops.river, name), copies(name, 0)
    with forward_ad.dual_level():
        call(op, values)
        values[0] = forward_ad.make_dual(values[0].detach(), torch.ones_like(values[0]))
        with pytest.raises(RuntimeError, match=f"river::{name} has no derivative"):
            op(*values)


def test_jvp_is_refused():
    weight = torch.ones(4, 64)
    with pytest.raises(RuntimeError, match="river::linear has no derivative"):
        torch.func.jvp(lambda h: ops.linear(h, weight), (torch.ones(1, 64),), (torch.ones(1, 64),))
