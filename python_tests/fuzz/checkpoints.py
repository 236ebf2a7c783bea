"""Checkpoints whose config.json or model.safetensors has been changed."""

import json
import os
import shutil
import struct
from pathlib import Path
from random import Random

from . import ACCEPTED, REFUSED, expect, expect_one_line
from .mutate import HOSTILE, dump_json, mutate_bytes, mutate_json
from .samples import write_checkpoint

KEYS = [
    "attention_bias", "attention_dropout", "attn_logit_softcapping", "clip_qkv", "embedding_multiplier",
    "eos_token_id", "expert_count", "final_logit_softcapping", "head_dim", "hidden_act", "layer_types",
    "logit_scale", "max_window_layers", "mlp_bias", "no_rope_layers", "num_experts", "num_key_value_heads",
    "num_local_experts", "original_max_position_embeddings", "partial_rotary_factor", "pretraining_tp",
    "quantization_config", "residual_multiplier", "rms_norm_eps", "rope_parameters", "rope_scaling",
    "rope_theta", "sliding_window", "tie_word_embeddings", "torch_dtype", "use_qk_norm", "use_sliding_window",
    "dtype", "bos_token_id", "text_config",
]  # fmt: skip
ROPES = [
    {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
     "high_freq_factor": 4.0}
    for kind in ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su", "x")
]  # fmt: skip


class State:
    def __init__(self, folder: Path):
        self.start = write_checkpoint(folder / "start")
        self.work = folder / "work"
        self.config = json.loads((self.start / "config.json").read_text())
        self.weights = (self.start / "model.safetensors").read_bytes()
        model = load(self.start)
        self.plain, self.tokens = model.config, answer(model)


def load(path: Path):
    import river_ext

    return river_ext.load(path, device="cpu")


def answer(model) -> list[list[int]]:
    """Few tokens in each mode; ids that every vocabulary of the samples has."""
    return [
        model.generate([1, 2, 0], max_new_tokens=3, mode=mode, stop_tokens=()).tokens
        for mode in ("full", "river")
    ]


def prepare(folder: Path) -> State:
    return State(folder)


def attempt(state: State, random: Random) -> str:
    from river_ext import RiverError

    shutil.rmtree(state.work, ignore_errors=True)
    shutil.copytree(state.start, state.work)
    weights_are_new = random.random() < 0.4
    (change_weights if weights_are_new else change_config)(state, random)
    try:
        model = load(state.work)
        tokens = answer(model)
    except RiverError as error:
        expect_one_line(error)
        return REFUSED
    for new in tokens:
        expect(all(0 <= token < model.config.vocab_size for token in new), f"tokens {new}")
    if model.config == state.plain and not weights_are_new:
        expect(tokens == state.tokens, f"the same config, other tokens: {tokens}")
    return ACCEPTED


def change_config(state: State, random: Random) -> None:
    path, kind = state.work / "config.json", random.randrange(10)
    config = dict(state.config)
    if kind < 4:
        data = dump_json(random, mutate_json(random, config))
    elif kind < 7:
        key = random.choice(KEYS)
        config[key] = (
            random.choice(ROPES)
            if key.startswith("rope_") and random.random() < 0.7
            else random.choice(HOSTILE)
        )
        data = dump_json(random, mutate_json(random, config) if random.random() < 0.3 else config)
    elif kind < 9:
        data = mutate_bytes(random, json.dumps(config).encode())
    else:
        replace_file(random, path)
        return
    path.write_bytes(data)


def change_weights(state: State, random: Random) -> None:
    path, kind = state.work / "model.safetensors", random.randrange(10)
    (length,) = struct.unpack("<Q", state.weights[:8])
    header, data = json.loads(state.weights[8 : 8 + length]), state.weights[8 + length :]
    if kind < 5:
        text = dump_json(random, mutate_json(random, header))
        length = (
            len(text)
            if random.random() < 0.8
            else random.choice((0, 1, len(text) - 1, len(text) + 1, 2**31, 2**63))
        )
        path.write_bytes(struct.pack("<Q", length) + text + data)
    elif kind < 7:
        path.write_bytes(mutate_bytes(random, state.weights))
    elif kind < 8:  # values that are no numbers, or large ones
        at = random.randrange(0, len(data) - 4, 4)
        value = random.choice((float("nan"), float("inf"), -float("inf"), 3e38, 1e-44, 1e20))
        path.write_bytes(state.weights[: 8 + length] + data[:at] + struct.pack("<f", value) + data[at + 4 :])
    elif kind < 9:
        index = {
            "metadata": {},
            "weight_map": {name: "model.safetensors" for name in header if name != "__metadata__"},
        }
        (state.work / "model.safetensors.index.json").write_bytes(
            dump_json(random, mutate_json(random, index))
        )
        if random.random() < 0.5:
            path.rename(
                state.work / random.choice(("model-00001-of-00001.safetensors", "weights.safetensors"))
            )
    else:
        replace_file(random, path)


def replace_file(random: Random, path: Path) -> None:
    """Something else than a file of JSON or tensors in its place."""
    path.unlink()
    kind = random.randrange(6)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(random.choice(("/dev/zero", "/dev/null", "nowhere", path.name, "/proc/self/mem")))
    elif kind == 3:
        path.write_bytes(b"")
    elif kind == 4:
        path.write_bytes(bytes(random.randrange(1, 64)))
