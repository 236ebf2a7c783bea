"""Damaged checkpoints and rivers, by the thousand: each is read as it should be, or refused in one line.

RIVER_FUZZ=N multiplies the number of inputs. A failure names the seed of its input.
"""

import copy
import json
import os
import random
from dataclasses import fields

import pytest
import torch
from conftest import TINY_CONFIG

from river_ext import river
from river_ext.checkpoint import load_checkpoint
from river_ext.config import ModelConfig, read_config
from river_ext.errors import RiverError
from river_ext.rope import rope_tables

SCALE = int(os.environ.get("RIVER_FUZZ", "1"))
BATCH = 100  # inputs of one test

ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = [
    TINY_CONFIG,
    TINY_CONFIG | {"rope_scaling": ROPE, "head_dim": 16, "attention_bias": True},
    TINY_CONFIG | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}},
    TINY_CONFIG | {"model_type": "mistral", "sliding_window": 64},
    TINY_CONFIG | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64},
    TINY_CONFIG | {"model_type": "qwen3", "layer_types": ["full_attention"] * 3, "max_window_layers": 1},
]
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 63, 64, 65, 256, 257, 1 << 24, 1 << 31, 1 << 63, 10**400, 0.0, -0.0,
    0.5, 1.0, 64.0, 1e-45, 1e-300, 1e39, 1e308, float("nan"), float("inf"), -float("inf"), "", "64", "silu",
    "llama", "qwen3", "\x00\n\x1b[31m", "\ud800", [], [1], [[]], {}, {"a": {}},
    ["full_attention"] * 3, "x" * 10000,
]  # fmt: skip
KEYS = [
    "head_dim", "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window", "layer_types",
    "mlp_bias", "hidden_act", "quantization_config", "partial_rotary_factor", "dtype", "num_experts",
    "logit_scale", "original_max_position_embeddings", "max_window_layers", "attention_bias", "Ünicode", "",
]  # fmt: skip


def one_line(error: RiverError) -> None:
    assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 1000, str(error)


def mutated_config(rng: random.Random) -> dict:
    values = copy.deepcopy(rng.choice(CONFIGS))
    for _ in range(rng.randint(1, 3)):
        place = values
        nested = [value for value in values.values() if isinstance(value, dict) and value]
        if nested and rng.random() < 0.4:
            place = rng.choice(nested)
        key = rng.choice([*place, *KEYS])
        if rng.random() < 0.15:
            place.pop(key, None)
        else:
            place[key] = copy.deepcopy(rng.choice(VALUES))
    return values


def mutated_bytes(rng: random.Random, data: bytes, header: int = 0) -> bytes:
    """Cut, extended, or with other bytes; half of the changes are in the first `header` bytes."""
    data = bytearray(data)
    kind = rng.random()
    if kind < 0.15:
        return bytes(data[: rng.randrange(len(data))])
    if kind < 0.25:
        return bytes(data) + rng.randbytes(rng.choice((1, 8, 5000)))
    for _ in range(rng.choice((1, 1, 2, 8))):
        end = header if header and rng.random() < 0.5 else len(data)
        place = rng.randrange(end)
        data[place] = rng.choice(
            (data[place] ^ (1 << rng.randrange(8)), rng.randrange(256), *b'0"{}[],:\x00')
        )
    return bytes(data)


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@pytest.mark.parametrize("batch", range(15 * SCALE))
def test_configs(tmp_path, batch):
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        rng = random.Random(seed)
        text = json.dumps(mutated_config(rng)).encode()
        if rng.random() < 0.1:
            text = mutated_bytes(rng, text)
        (tmp_path / "config.json").write_bytes(text)
        try:
            config = read_config(tmp_path)
        except RiverError as error:
            one_line(error)
            continue
        except Exception as error:
            pytest.fail(f"seed {seed}: {error!r} for {text[:2000]}")
        assert isinstance(config, ModelConfig), seed
        sizes = (config.hidden_size, config.head_dim, config.intermediate_size, config.num_hidden_layers)
        assert all(type(size) is int and size > 0 for size in sizes), seed
        for table in rope_tables(config, min(config.max_length, 4), seq_len=config.max_length):
            assert table.isfinite().all(), seed


@pytest.mark.parametrize("batch", range(3 * SCALE))
def test_checkpoints(tiny_checkpoint, batch):
    directory = tiny_checkpoint()
    data = (directory / "model.safetensors").read_bytes()
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        rng = random.Random(seed)
        (directory / "model.safetensors").write_bytes(mutated_bytes(rng, data, header_end(data)))
        try:
            weights = load_checkpoint(directory).weights
        except RiverError as error:
            one_line(error)
            continue
        except Exception as error:
            pytest.fail(f"seed {seed}: {error!r}")
        assert all(
            t.isfinite().all() for layer in weights.layers for t in vars(layer).values() if t is not None
        )


@pytest.mark.parametrize("batch", range(4 * SCALE))
def test_rivers(tiny_checkpoint, tmp_path, batch):
    """A river that loads is the one that was saved."""
    checkpoint = load_checkpoint(tiny_checkpoint())
    built = river.build_river(checkpoint.config, checkpoint.weights)
    path = tmp_path / "river"
    river.save_river(path, built, checkpoint.config, checkpoint.fingerprint)
    files = {file: file.read_bytes() for file in path.iterdir()}
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        rng = random.Random(seed)
        damaged = rng.choice(sorted(files))
        if damaged.suffix == ".json" and rng.random() < 0.5:
            facts = json.loads(files[damaged])
            place = rng.choice((facts, facts["block"]))
            place[rng.choice(sorted(place))] = rng.choice(VALUES)
            damaged.write_text(json.dumps(facts))
        else:
            header = header_end(files[damaged]) if damaged.suffix == ".safetensors" else 0
            damaged.write_bytes(mutated_bytes(rng, files[damaged], header))
        try:
            loaded = river.load_river(path, checkpoint.config, checkpoint.fingerprint)
        except RiverError as error:
            one_line(error)
        except Exception as error:
            pytest.fail(f"seed {seed}: {error!r}")
        else:
            assert (loaded.group_size, loaded.quantiser) == (64, "hqq"), seed
            for one, other in zip(loaded, built, strict=True):
                assert all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)), (
                    seed
                )
        damaged.write_bytes(files[damaged])
