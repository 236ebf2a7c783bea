"""What torch is told of the ops beside their kernels: fake kernels, no gradients, and errors of one line."""

import re
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _C

_LIBRARY = torch.library.Library("river", "IMPL")  # what is registered lives as long as this
_MISMATCH = re.compile(r"Expected a value of type '(.+?)' for argument '(\w+)' but instead found type")


def register() -> SimpleNamespace:
    """The ops by name, to be called with all of their arguments in the order of the schema."""
    names = [
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("river::")
    ]
    overloads = {name: getattr(torch.ops.river, name).default for name in names}
    for name, op in overloads.items():
        _LIBRARY.impl(name, _without_gradient(name, op), "Autograd", with_keyset=True)
    return SimpleNamespace(**{name: _with_short_errors(name, op) for name, op in overloads.items()})


def _without_gradient(name: str, op: torch._ops.OpOverload) -> Callable:
    """The kernel above all devices: what an op returns says in backward() that there is no gradient."""
    arguments = op._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]

    def run(keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            result = op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        if written:  # what autograd has saved of them is no longer there
            torch.autograd.graph.increment_version([args[i] for i in written])
        return result

    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            return run(*args)

        @staticmethod
        def backward(ctx, *gradients):
            raise RuntimeError(
                f"river::{name} has no gradient; accepted: no backward() through it, as under torch.no_grad()"
            )

    def kernel(keyset, *args):
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            raise RuntimeError(f"river::{name} has no derivative; accepted: tensors without tangents")
        if not torch.is_grad_enabled() or not torch._C._any_requires_grad(*args):
            return run(keyset, *args)
        for i in written:
            if args[i] is not None and args[i].requires_grad:
                raise RuntimeError(
                    f"river::{name}: {arguments[i].name} requires grad, and is written in place"
                )
        return NoGradient.apply(keyset, *args)

    return kernel


def _has_tangent(value) -> bool:
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _with_short_errors(name: str, op: torch._ops.OpOverload) -> Callable:
    """The op, with one line that names the argument where torch has many for a value of the wrong type."""

    def call(*args):
        try:
            return op(*args)
        except RuntimeError as error:
            message = _wrong_type(op, args, str(error))
            if message is None:
                raise
        raise RuntimeError(f"river::{name}: {message}")

    return call


def _wrong_type(op: torch._ops.OpOverload, args: tuple, error: str) -> str | None:
    """What is wrong with an argument, if that is why torch gave the error."""
    if not (found := _MISMATCH.search(error)):
        return _no_tensor(op, args)
    expected, name = found.groups()
    value = args[[argument.name for argument in op._schema.arguments].index(name)]
    expected = "torch.dtype" if name == "dtype" else {"Tensor": "a tensor"}.get(expected, expected)
    return f"{name} is {_short(value)}, expected {expected}"


def _no_tensor(op: torch._ops.OpOverload, args: tuple) -> str | None:
    """The first None for a tensor, which torch lets pass, or tensor that is not dense."""
    for argument, value in zip(op._schema.arguments, args, strict=False):  # fewer: the rest are defaults
        if value is None and str(argument.type) == "Tensor":
            return f"{argument.name} is None, expected a tensor"
        if isinstance(value, Tensor) and value.layout != torch.strided:
            return f"{argument.name} is {value.layout}, expected {torch.strided}"
    return None


def _short(value) -> str:
    text = (
        repr(value) if value is None or isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
    )
    return text if len(text) <= 60 else text[:57] + "..."


# --- fake kernels ----------------------------------------------------------------------------------------


def packed_shape(out_features: int, in_features: int) -> tuple[int, int, int]:
    """Shape of the packed form of a weight."""
    return (-(-out_features // _C.TILE_ROWS), -(-in_features // _C.TILE_COLS), _C.TILE_BYTES)


def _fake(name: str, on_host: str = ""):
    """Registers the fake kernel of an op.

    Torch also takes it when one argument alone has no data, so it insists that all tensors are on one device:
    else the op would return memory that nobody wrote. The argument `on_host` is on the CPU beside tensors of
    any device.
    """

    def register(fake):
        @torch.library.register_fake(f"river::{name}")
        def checked(*args):
            op = getattr(torch.ops.river, name).default
            if message := _no_tensor(op, args):
                raise RuntimeError(f"river::{name}: {message}")
            names = [argument.name for argument in op._schema.arguments[: len(args)]]
            tensors = {n: a for n, a in zip(names, args, strict=True) if isinstance(a, Tensor)}
            host = tensors.pop(on_host, None)
            first, *others = tensors.values()
            for other in others:
                if other.device != first.device:
                    raise RuntimeError(
                        f"river::{name}: tensors on {first.device} and {other.device}, expected one device"
                    )
            if host is not None and host.device.type != "cpu":
                raise RuntimeError(f"river::{name}: {on_host} is on {host.device}, expected cpu")
            return fake(*args)

    return register


@_fake("decoder_block")
def _(hidden, *args):
    return torch.empty_like(hidden), hidden.new_empty(hidden.shape[0], dtype=torch.float32)


@_fake("exit_layer")
def _(hidden, *args):
    return torch.empty_like(hidden), hidden.new_empty(hidden.shape[0], dtype=torch.float32)


@_fake("dual_layer")
def _(index, hidden, *args):
    return torch.empty_like(hidden)


@_fake("advance", on_host="records")
def _(*args):
    return None


@_fake("draft_advance")
def _(*args):
    return None


@_fake("accept", on_host="records")
def _(*args):
    return None


@_fake("state_similarity")
def _(x, y):
    return x.new_empty(x.shape[0], dtype=torch.float32)


@_fake("decode_attention")
def _(query, *args):
    return torch.empty_like(query)


@_fake("lm_head")
def _(hidden, norm, weight, rms_norm_eps, return_logits=True, *args):
    rows = hidden.shape[0]
    logits = hidden.new_empty(rows if return_logits else 0, weight.shape[0], dtype=torch.float32)
    return hidden.new_empty(rows, dtype=torch.int64), logits, logits.new_empty(rows)


@_fake("lm_head_w4")
def _(hidden, norm, weight, vocab_size, rms_norm_eps, return_logits=True, *args):
    rows = hidden.shape[0]
    logits = hidden.new_empty(rows if return_logits else 0, vocab_size, dtype=torch.float32)
    return hidden.new_empty(rows, dtype=torch.int64), logits, logits.new_empty(rows)


@_fake("sample")
def _(logits, *args):
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows)


@_fake("linear")
def _(x, weight, bias=None):
    return x.new_empty(x.shape[0], weight.shape[0])


@_fake("linear_w4")
def _(x, weight, out_features, bias=None):
    return x.new_empty(x.shape[0], out_features)


@_fake("pack_w4")
def _(q, scale, zero):
    return q.new_empty(packed_shape(*q.shape))


@_fake("unpack_w4")
def _(packed, out_features, in_features, group_size=64):
    groups = -(-in_features // group_size)
    return (
        packed.new_empty(out_features, in_features),
        packed.new_empty(out_features, groups, dtype=torch.float16),
        packed.new_empty(out_features, groups, dtype=torch.float16),
    )


@_fake("dequantize_w4")
def _(packed, out_features, in_features, dtype):
    return packed.new_empty(out_features, in_features, dtype=dtype)
