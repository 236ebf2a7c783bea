"""Ops with one or two arguments changed: one error that touches nothing, or what the reference gives."""

import inspect
from pathlib import Path
from random import Random

import torch

from . import ACCEPTED, REFUSED, Finding, expect, expect_one_line
from .mutate import HOSTILE

WRITTEN = {
    "decoder_block": ("k_cache", "v_cache"),
    "exit_layer": ("k_cache", "v_cache"),
    "dual_layer": ("exited", "similarities", "k_cache", "v_cache"),
    "advance": (
        "hidden",
        "slots",
        "positions",
        "draw_positions",
        "remaining",
        "exited",
        "similarities",
        "step",
        "records",
    ),
    "draft_advance": (
        "drafts",
        "hidden",
        "slots",
        "positions",
        "draw_positions",
        "verify_hidden",
        "verify_slots",
    ),
    "accept": (
        "drafts",
        "remaining",
        "hidden",
        "slots",
        "positions",
        "draw_positions",
        "verify_hidden",
        "verify_slots",
        "verify_positions",
        "verify_draw_positions",
        "step",
        "records",
    ),
}
NUMBERS = [value for value in HOSTILE if isinstance(value, (int, float, type(None)))] + ["x", torch.tensor(1)]


class State:
    """Arguments by op and name, all right."""

    def __init__(self):
        from test_ops import SAMPLES

        from river_ext import ops

        self.calls = {}
        for name, values in SAMPLES.items():
            parameters = list(inspect.signature(getattr(ops, name)).parameters)
            self.calls[name] = dict(zip(parameters, values, strict=False))


def prepare(folder: Path) -> State:
    from . import samples  # noqa: F401  (puts the tests on the path)

    return State()


def attempt(state: State, random: Random) -> str:
    from river_ext import ops, reference

    name = random.choice(list(state.calls))
    storage = {key: copy(value) for key, value in state.calls[name].items()}
    arguments = dict(storage)
    changed = random.sample(list(arguments), random.choice((0, 1, 1, 1, 2)))
    for key in changed:
        arguments[key] = change(random, arguments, key)
    twin = {key: copy(value) for key, value in arguments.items()}
    tensors = {key: (value, bits(value)) for key, value in arguments.items() if plain(value)}
    try:
        result = getattr(ops, name)(**arguments)
    except (RuntimeError, ValueError, TypeError) as error:
        # torch itself says several lines of arguments that are no tensors, or of a kind without kernels
        expect_one_line(type(error)(str(error).split("\n")[0]))
        for key, (tensor, before) in tensors.items():
            expect(bits(tensor) == before, f"{name}({changed}): refused, but {key} was written")
        return REFUSED
    if name == "advance" and arguments["before"].data_ptr() == arguments["hidden"].data_ptr():
        del tensors["before"]  # in a model with one layer it is hidden itself
    for key, (tensor, before) in tensors.items():
        expect(
            key in WRITTEN.get(name, ()) or bits(tensor) == before, f"{name}({changed}): {key} was written"
        )
    compare(name, changed, result, arguments, getattr(reference, name), twin)
    return ACCEPTED


def copy(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def plain(value) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and not value.is_sparse


def bits(tensor: torch.Tensor) -> bytes:
    return (
        tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    )


def change(random: Random, arguments: dict, key: str):
    value = arguments[key]
    if not isinstance(value, torch.Tensor):
        if value is None and random.random() < 0.5:
            others = [other for other in arguments.values() if isinstance(other, torch.Tensor)]
            return random.choice(others).clone()
        return random.choice(NUMBERS)
    kind = random.randrange(12)
    if kind == 0:
        return random.choice([None, 1, "x", [1.0]])
    others = [v for k, v in arguments.items() if plain(v) and k != key]
    if kind == 6 and others:  # on top of another argument
        return overlapping(random, value, random.choice(others))
    changed = other_form(random, value, kind) if kind < 6 else other_values(random, value, kind)
    if changed is not None:
        return changed
    return random.choice(
        [value[:0] if value.dim() else value, value.to_sparse() if value.numel() < 10**4 else value]
    )


def other_form(random: Random, value: torch.Tensor, kind: int) -> torch.Tensor | None:
    """Another dtype, shape, layout or device; None where this kind of change does not fit the tensor."""
    if kind == 1:
        return value.to(
            random.choice(
                [torch.float64, torch.float32, torch.int64, torch.int32, torch.uint8, torch.bfloat16]
            )
        )
    if kind == 2 and value.dim():
        sizes = list(value.shape)
        sizes[random.randrange(len(sizes))] = random.choice([0, 1, 2, 7, 17, sizes[0] + 1])
        return value.new_zeros(sizes)
    if kind == 3:
        return random.choice([value[None], value.flatten(), value.reshape(*value.shape, 1)])
    if kind == 4 and value.dim() > 1:
        return random.choice(
            [value.transpose(0, -1), value.transpose(0, -1).contiguous().transpose(0, -1), value[::2]]
        )
    if kind == 5:
        return value.to("meta") if random.random() < 0.5 else value.expand(2, *value.shape)
    return None


def other_values(random: Random, value: torch.Tensor, kind: int) -> torch.Tensor | None:
    """An extreme number, another place in memory, or a gradient; None where this kind does not fit."""
    if kind == 7 and not value.dtype.is_floating_point and value.numel():
        changed = value.clone()
        info = torch.iinfo(value.dtype)
        flat = changed.view(-1)
        flat[random.randrange(value.numel())] = random.choice([info.min, info.max, info.max // 2, 0, 100])
        return changed
    if kind == 8 and value.dtype.is_floating_point and value.numel():
        changed = value.clone()
        changed.view(-1)[random.randrange(value.numel())] = random.choice(
            [float("nan"), float("inf"), -1.0, 1e30, 0.0]
        )
        return changed
    if kind == 9:  # not where torch allocates
        return torch.cat([value.flatten(), value.flatten()[:1]])[1:].view(value.shape)
    if kind == 10 and value.dtype.is_floating_point:
        return value.clone().requires_grad_()
    return None


def overlapping(random: Random, value: torch.Tensor, other: torch.Tensor):
    """A tensor like value inside the memory of another one, where that is large enough."""
    memory = other.untyped_storage()
    spare = memory.nbytes() // value.element_size() - value.numel()
    if spare < 0:
        return value
    start = random.choice([0, spare, random.randrange(spare + 1)])
    return torch.empty(0, dtype=value.dtype).set_(memory, start, value.shape)


def compare(name, changed, result, arguments, reference, twin) -> None:
    """Results and written arguments against the reference's, where it takes such arguments at all."""
    values = [v for v in twin.values() if isinstance(v, torch.Tensor)]
    if any(v.is_meta or v.is_floating_point() and not (v.abs() < 1e15).all() for v in values):
        return  # what NaN and overflow do to their neighbours is the business of other tests
    try:
        with torch.no_grad():
            expected = reference(**twin)
    except OverflowError:
        return  # an integer that is no fp64; the ops take it for infinite or for the nearest number
    except Exception as error:
        raise Finding(
            f"{name}({changed}): accepted, but the reference says {type(error).__name__}: {error}"
        ) from error
    pairs = list(zip(*(r if isinstance(r, tuple) else (r,) for r in (result, expected)), strict=True))
    pairs += [(arguments[key], twin[key]) for key in WRITTEN.get(name, ()) if key != "records"]
    for got, wanted in pairs:
        if got is None:
            continue
        expect(
            got.shape == wanted.shape and got.dtype == wanted.dtype,
            f"{name}({changed}): {got.shape}, {wanted.shape}",
        )
        if got.dtype.is_floating_point and not wanted.isfinite().all():
            continue  # packed scales may be anything
        if got.dtype.is_floating_point and got.numel():
            limit = 2**-5 * max(1e-3, wanted.double().abs().max().item())
            error = (got.detach().double() - wanted.double()).abs().max().item()
            expect(error <= limit, f"{name}({changed}): off by {error:.3g} of {limit * 32:.3g}")
        else:
            expect(torch.equal(got, wanted), f"{name}({changed}): not what the reference gives")
