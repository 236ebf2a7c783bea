"""config.json of every family with other values: refused, or a config whose sizes and tables make sense."""

import copy
import json
from pathlib import Path
from random import Random

from . import ACCEPTED, REFUSED, expect, expect_one_line
from .checkpoints import KEYS
from .mutate import HOSTILE, mutate_bytes

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CHANGES = [
    {},
    {"rope_scaling": LLAMA3, "head_dim": 16, "attention_bias": True},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}},
    {"model_type": "mistral", "sliding_window": 64},
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64},
    {"model_type": "phi3", "partial_rotary_factor": 0.5, "original_max_position_embeddings": 64,
     "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
    {"model_type": "ministral3", "rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0,
        "llama_4_scaling_beta": 0.1}},
    {"model_type": "smollm3", "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 8},
    {"model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention"] * 3},
    {"model_type": "qwen3", "layer_types": ["full_attention"] * 3, "max_window_layers": 1},
    {"model_type": "granite", "embedding_multiplier": 12.0, "logits_scaling": 8},
]  # fmt: skip


def prepare(folder: Path) -> Path:
    from . import samples  # noqa: F401  (puts the tests on the path)

    return folder


def attempt(folder: Path, random: Random) -> str:
    from river_ext import RiverError
    from river_ext.loading.config import read_config
    from river_ext.loading.rope import rope_tables

    text = json.dumps(changed(random)).encode()
    (folder / "config.json").write_bytes(mutate_bytes(random, text) if random.random() < 0.1 else text)
    try:
        config = read_config(folder)
    except RiverError as error:
        expect_one_line(error, limit=1000)
        return REFUSED
    sizes = (config.hidden_size, config.head_dim, config.intermediate_size, config.num_hidden_layers)
    expect(all(type(size) is int and size > 0 for size in sizes), f"sizes {sizes}")
    for table in rope_tables(config, min(config.max_length, 4), seq_len=config.max_length):
        expect(bool(table.isfinite().all()), f"tables that are not finite, of {text[:300]!r}")
    return ACCEPTED


def changed(random: Random) -> dict:
    from conftest import TINY_CONFIG

    config = copy.deepcopy(TINY_CONFIG | random.choice(CHANGES))
    for _ in range(random.randint(1, 3)):
        nested = [value for value in config.values() if isinstance(value, dict) and value]
        place = random.choice(nested) if nested and random.random() < 0.4 else config
        key = random.choice([*place, *KEYS])
        if random.random() < 0.15:
            place.pop(key, None)
        else:
            place[key] = copy.deepcopy(random.choice(HOSTILE))
    return config
