"""What config.json says of positions: RoPE, the layers that go without it, and the sliding window."""

import math
from typing import NamedTuple

import torch

from .families import FAMILIES, Family, refuse_foreign_rope_keys
from .json_object import Reader

MAX_POSITIONS = 1 << 24
ORIGINAL = "original_max_position_embeddings"
YARN_KEYS = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
LONGROPE_KEYS = {"attention_factor", "short_factor", "long_factor"}
QUERY_SCALE_KEYS = {"llama_4_scaling_beta"}


class RopeConfig(NamedTuple):
    """The fields of `ModelConfig` that the object rope_scaling or rope_parameters decides."""

    rotary_dim: int
    rope_theta: float
    rope_scaling: dict | None
    query_scaling: tuple[float, int] | None


def read_rope(top: Reader, family: Family, head_dim: int, max_positions: int) -> RopeConfig:
    """From either spelling: rope_theta and rope_scaling, or rope_parameters."""
    key = "rope_scaling" if top.values.get("rope_scaling") else "rope_parameters"
    values = top.values.get(key) or {}
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        top.fail(key, "an object with rope_type, the same for all layers")
    if family.query_scale and not values:  # transformers has one of its own then
        top.fail(key, "an object with rope_type and what else the positions take")
    rope = Reader(top.path, values, prefix=f"{top.prefix}{key}.")
    rope_type = _rope_type(rope, family)
    of_type = {"yarn": YARN_KEYS, "longrope": LONGROPE_KEYS}.get(rope_type, set())
    refuse_foreign_rope_keys(rope, of_type | (QUERY_SCALE_KEYS if family.query_scale else set()))
    other = top.values.get("rope_parameters")
    for name in values.keys() & other.keys() if isinstance(other, dict) else ():
        if other[name] != values[name]:
            rope.fail(name, f"what rope_parameters.{name} is, or only one of the two objects")
    theta = rope.owner("rope_theta", top).number("rope_theta", 1.0, 1e12, default=family.rope_theta)
    rotary_dim = _rotary_dim(rope.owner("partial_rotary_factor", top), family, head_dim)
    original = _original_positions(top, rope, family, max_positions)
    beta = rope.number("llama_4_scaling_beta", 0.0, 1e3, default=0.0) if family.query_scale else 0.0
    return RopeConfig(
        rotary_dim=rotary_dim,
        rope_theta=theta,
        rope_scaling=_scaling(rope, rope_type, theta, rotary_dim, max_positions, original),
        query_scaling=(beta, original) if beta else None,
    )


def _rotary_dim(reader: Reader, family: Family, head_dim: int) -> int:
    factor = reader.number("partial_rotary_factor", 0.0, 1.0, default=1.0)
    if factor != 1.0 and not family.partial_rotary:
        whole = ", ".join(name for name, other in FAMILIES.items() if not other.partial_rotary)
        reader.fail("partial_rotary_factor", f"1, whole heads rotate in {whole}")
    rotary_dim = int(head_dim * factor)
    if rotary_dim < 2 or rotary_dim % 2:
        reader.fail(
            "partial_rotary_factor", f"one that gives an even number of the {head_dim} dims of a head"
        )
    return rotary_dim


def _original_positions(top: Reader, rope: Reader, family: Family, max_positions: int) -> int:
    """The positions that the model was trained with before its RoPE was scaled."""
    owner = top.owner(ORIGINAL, rope)  # where both say it, transformers takes the outer one
    if owner is rope and family.original_positions:
        return family.original_positions  # what transformers has outside, if the file says nothing
    return owner.integer(ORIGINAL, 1, MAX_POSITIONS, default=max_positions)


def _rope_type(rope: Reader, family: Family) -> str:
    rope_type = rope.choice(_type_key(rope), family.rope_types, default="default")
    renamed = "longrope" in family.rope_types and rope_type in ("su", "yarn")
    return "longrope" if renamed else rope_type


def _type_key(rope: Reader) -> str:
    return "rope_type" if rope.values.get("rope_type") is not None else "type"


def _scaling(
    rope: Reader, rope_type: str, theta: float, rotary_dim: int, max_positions: int, original: int
) -> dict | None:
    """The normalised rope_scaling: its rope_type, and all numbers that the tables take."""
    if rope_type == "default":
        if rope.number("factor", 1.0, 1e4, default=1.0) != 1:
            rope.fail("factor", f"1, or a {rope.prefix}rope_type that takes a factor")
        return None
    if rope_type == "longrope":
        return _longrope(rope, rotary_dim, max_positions, original)
    if rope_type == "yarn":
        if theta == 1.0:
            rope.fail(_type_key(rope), "another one, yarn needs a rope_theta above 1")
        return _yarn(rope, max_positions, original)
    factor = rope.number("factor", 1.0, 1e4)
    if rope_type == "llama3":
        return _llama3(rope, factor, original)
    if max_positions * factor > MAX_POSITIONS:
        rope.fail("factor", f"one that gives at most {MAX_POSITIONS} positions")
    if rope_type == "dynamic" and rotary_dim == 2:
        rope.fail(_type_key(rope), "another one, dynamic needs a head_dim of 4 or more")
    return {"rope_type": rope_type, "factor": factor}


def _llama3(rope: Reader, factor: float, original: int) -> dict:
    low = rope.number("low_freq_factor", 1e-3, 1e6)
    high = rope.number("high_freq_factor", 1e-3, 1e6)
    if not torch.tensor(high) > torch.tensor(low):  # in fp32, where their difference divides
        rope.fail("high_freq_factor", f"a number above low_freq_factor, {low:g}")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        ORIGINAL: original,
    }


def _yarn(rope: Reader, max_positions: int, original: int) -> dict:
    factor = rope.number("factor", 1.0, 1e4, default=max(1.0, max_positions / original))
    if original * factor > MAX_POSITIONS:
        rope.fail("factor", f"one that gives at most {MAX_POSITIONS} positions")
    # 0 counts as missing in transformers
    beta_fast = rope.number("beta_fast", 0.0, 1e6, default=32.0) or 32.0
    beta_slow = rope.number("beta_slow", 0.0, 1e6, default=1.0) or 1.0
    if beta_fast < beta_slow:
        rope.fail("beta_fast", f"a number from beta_slow, {beta_slow:g}, on")
    scales = [rope.number(name, 0.0, 1e3, default=0.0) for name in ("mscale", "mscale_all_dim")]
    one, all_dim = (0.1 * scale * math.log(factor) + 1.0 for scale in (scales if all(scales) else (1.0, 0.0)))
    return {
        "rope_type": "yarn",
        "factor": factor,
        "attention_factor": rope.number("attention_factor", 1e-3, 1e3, default=one / all_dim),
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
        "truncate": rope.boolean("truncate", True),
        ORIGINAL: original,
    }


def _longrope(rope: Reader, rotary_dim: int, max_positions: int, original: int) -> dict:
    if original == 1:
        rope.fail(ORIGINAL, f"an integer from 2 to {MAX_POSITIONS}")
    factor = rope.number("factor", 1.0, 1e4, default=max(1.0, max_positions / original))
    stretched = math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "rope_type": "longrope",
        "short_factor": rope.numbers("short_factor", rotary_dim // 2, 1e-3, 1e6),
        "long_factor": rope.numbers("long_factor", rotary_dim // 2, 1e-3, 1e6),
        "attention_factor": rope.number("attention_factor", 1e-3, 1e3, default=stretched),
        ORIGINAL: original,
    }


def read_nope_layers(top: Reader, family: Family, layers: int) -> tuple[int, ...]:
    """The layers without RoPE."""
    if not family.nope:
        return ()
    if top.values.get("no_rope_layers") is None:
        interval = top.integer("no_rope_layer_interval", 1, 1 << 16, default=4)
        return tuple(range(interval - 1, layers, interval))
    rotates = top.values["no_rope_layers"]
    if not isinstance(rotates, list) or len(rotates) < layers or any(r not in (0, 1) for r in rotates):
        top.fail("no_rope_layers", f"an array of {layers} numbers, 1 for a layer with RoPE and 0 without")
    return tuple(layer for layer in range(layers) if not rotates[layer])


def read_windows(
    top: Reader, family: Family, layers: int, max_positions: int, nope_layers: tuple[int, ...]
) -> tuple[int | None, tuple[int, ...]]:
    """The sliding window, or None, and the layers that see all positions in spite of it."""
    window = _window(top, family, max_positions)
    if top.values.get("layer_types") is not None:
        windowed = _windowed_by_type(top, family, layers, window)
    elif window is None:
        windowed = ()
    elif family.sliding_window != "switch":
        windowed = range(layers)
    elif family.nope:
        windowed = nope_layers
    else:
        windowed = range(top.integer("max_window_layers", 0, 1 << 16, default=28), layers)
    if not windowed:
        return None, ()
    return window, tuple(layer for layer in range(layers) if layer not in windowed)


def _windowed_by_type(top: Reader, family: Family, layers: int, window: int | None) -> list[int]:
    kinds = top.strings("layer_types")
    accepted = {"full_attention" if window is None else "sliding_attention"}
    if family.layer_types:
        accepted.add("full_attention")
    if len(kinds) != layers or not accepted.issuperset(kinds):
        either = " or ".join(repr(kind) for kind in sorted(accepted))
        top.fail("layer_types", f"{either} for each of the {layers} layers")
    return [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"]


def _window(top: Reader, family: Family, max_positions: int) -> int | None:
    if family.sliding_window == "key" and "sliding_window" not in top.values:
        top.fail("sliding_window", "the window's positions, or null for none")
    needs_switch = family.sliding_window in ("switch", None)
    if needs_switch and not top.boolean("use_sliding_window", family.sliding_window is None):
        return None
    if top.values.get("sliding_window") is None:
        return None
    window = top.integer("sliding_window", 1, MAX_POSITIONS)
    if family.sliding_window is None:
        if window < max_positions:
            top.fail("sliding_window", f"null, or all of the {max_positions} positions, in such a model")
        return None
    return window
