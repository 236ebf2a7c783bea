"""Checkpoints in the formats of other 4-bit quantisers, written by their documented layouts.

Nothing here is of the package: weights are rounded to the nearest, and words put together number by number.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Rounded:
    """A weight [N, K] rounded to 4 bits: (q - zero) * scale, a pair for each row and group of columns."""

    def __init__(self, weight, group_size, symmetric, scale_dtype=torch.float16):
        rows, columns = weight.shape
        groups = weight.float().view(rows, -1, columns if group_size == -1 else group_size)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        step = groups.abs().amax(-1) / 7 if symmetric else (high - low) / 15
        self.scale = step.clamp_min(1e-6).to(scale_dtype)  # [N, G]
        scale = self.scale.float()
        self.zero = torch.full_like(scale, 8) if symmetric else (-low / scale).round().clamp(1, 15)
        q = (groups / scale[..., None] + self.zero[..., None]).round().clamp(0, 15)
        self.dense = ((q - self.zero[..., None]) * scale[..., None]).view(rows, columns)
        self.q, self.zero = q.view(rows, columns).int(), self.zero.int()
        self.group_of_column = torch.arange(columns) // groups.shape[-1]


def words(numbers, order=tuple(range(8))):
    """int32 [rows, ceil(columns / 8)]: nibble i of a word holds the number order[i] of its eight."""
    eights = torch.nn.functional.pad(numbers.long(), (0, -numbers.shape[1] % 8)).unflatten(1, (-1, 8))
    unsigned = sum(eights[..., number] << 4 * nibble for nibble, number in enumerate(order))
    return (unsigned - (unsigned >> 31 << 32)).int()


def awq_tensors(weight):
    return {
        "qweight": words(weight.q.T, AWQ_ORDER),
        "qzeros": words(weight.zero.T, AWQ_ORDER),
        "scales": weight.scale.T,
    }


def gptq_tensors(weight, zero_offset=1):
    return {
        "qweight": words(weight.q).T,
        "qzeros": words(weight.zero.T - zero_offset),
        "scales": weight.scale.T,
        "g_idx": weight.group_of_column.int(),
    }


def gptq_v2_tensors(weight):
    return gptq_tensors(weight, zero_offset=0)


def compressed_tensors(weight):
    tensors = {
        "weight_packed": words(weight.q),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.q.shape),
    }
    if not (weight.zero == 8).all():
        tensors["weight_zero_point"] = words(weight.zero.T).T
    return tensors


def awq_settings(group_size, symmetric):
    return {
        "quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    }  # fmt: skip


def gptq_settings(group_size, symmetric):
    return {
        "quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": False, "sym": symmetric,
        "damp_percent": 0.01, "checkpoint_format": "gptq",
    }  # fmt: skip


def gptq_v2_settings(group_size, symmetric):
    return gptq_settings(group_size, symmetric) | {"checkpoint_format": "gptq_v2"}


def compressed_settings(group_size, symmetric):
    weights = {
        "num_bits": 4, "type": "int", "symmetric": symmetric, "dynamic": False, "actorder": None,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "quantization_status": "compressed",
    }  # fmt: skip


FORMATS = {
    "AWQ": (awq_tensors, awq_settings),
    "GPTQ": (gptq_tensors, gptq_settings),
    "GPTQ v2": (gptq_v2_tensors, gptq_v2_settings),
    "compressed-tensors": (compressed_tensors, compressed_settings),
}


def projection_names(layers):
    """(layer, projection, the name of its weight without the last word)."""
    for layer in range(layers):
        for projection in PROJECTIONS:
            part = "mlp" if projection in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            yield layer, projection, f"model.layers.{layer}.{part}.{projection}."


def write_packed(
    directory, model, format="AWQ", group_size=64, symmetric=False, scale_dtype=torch.float16, move=None,
    leave=(), edit=None, settings=None,
):  # fmt: skip
    """Writes the model, a checkpoint directory, in a format.

    Args:
        move: called with the dense tensors before they are rounded.
        leave: (layer, projection) pairs that are not quantised.
        edit: called with the tensors and the config.json before they are written.
        settings: changes to the object quantization_config.

    Returns:
        What was quantised: {(layer, projection): Rounded}.
    """
    directory = Path(directory)
    directory.mkdir(parents=True)
    pack, settings_of = FORMATS[format]
    config = json.loads((Path(model) / "config.json").read_text())
    config["quantization_config"] = settings_of(group_size, symmetric) | (settings or {})
    tensors = {name: tensor.float() for name, tensor in load_file(Path(model) / "model.safetensors").items()}
    if move:
        move(tensors)
    rounded = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        _, _, layer, *_, projection, _ = name.split(".")
        prefix, layer = name.removesuffix("weight"), int(layer)
        if (layer, projection) in leave:
            continue
        weight = Rounded(tensors.pop(prefix + "weight"), group_size, symmetric, scale_dtype)
        rounded[layer, projection] = weight
        tensors |= {prefix + part: tensor.contiguous() for part, tensor in pack(weight).items()}
    if edit:
        edit(tensors, config)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return rounded
