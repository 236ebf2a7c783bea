"""RoPE tables against transformers' and against the formulas."""

from dataclasses import replace

import pytest
import torch

from river_ext.loading.config import read_config
from river_ext.loading.rope import query_scales, rope_tables

SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "attention_factor": 1.3,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.05 * i for i in range(32)],
        "long_factor": [1.5 + 0.3 * i for i in range(32)],
        "attention_factor": 1.2,
        "original_max_position_embeddings": 250,
    },
}
SCALINGS["yarn, not truncated"] = SCALINGS["yarn"] | {"truncate": False, "beta_fast": 8.0, "beta_slow": 0.5}


@pytest.fixture
def config(tiny_checkpoint):
    base = read_config(tiny_checkpoint(head_dim=64))

    def make(scaling, **changes):
        values, pairs = SCALINGS[scaling], changes.get("rotary_dim", 64) // 2
        if scaling == "longrope":
            values = values | {name: values[name][:pairs] for name in ("short_factor", "long_factor")}
        return replace(base, rope_scaling=values, **changes)

    return make


def hf_tables(config, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a new model of transformers rotates a sequence of this length with."""
    pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

    scaling = config.rope_scaling or {"rope_type": "default"}
    embedding = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters={"rope_theta": config.rope_theta, **scaling},
        )
    )
    cos, sin = embedding(torch.zeros(1), torch.arange(length)[None])
    half = config.head_dim // 2
    return cos[0, :, :half], sin[0, :, :half]


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("length", [1, 200, 256, 257, 5000])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_tables_of_a_sequence_equal_transformers(config, scaling, length, theta):
    config = config(scaling, rope_theta=theta)
    # 2^-24 is the rounding of a cosine; where dynamic scaling has grown the base, the angles differ as well
    grown = scaling == "dynamic" and length > config.max_position_embeddings
    for ours, theirs in zip(
        rope_tables(config, length, seq_len=length), hf_tables(config, length), strict=True
    ):
        assert ours.dtype == torch.float32 and ours.shape == (length, 32)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 if grown else 2**-23)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_decoding_row_has_the_frequencies_of_its_own_length(config, scaling):
    config = config(scaling)
    cos, sin = rope_tables(config, 600)
    for length in (1, 2, 255, 256, 257, 258, 600):
        hf_cos, hf_sin = hf_tables(config, length)
        torch.testing.assert_close(cos[length - 1], hf_cos[-1], rtol=0, atol=2e-5)
        torch.testing.assert_close(sin[length - 1], hf_sin[-1], rtol=0, atol=2e-5)


def test_seq_len_matters_for_dynamic_past_the_original_length_only(config):
    for scaling in SCALINGS:
        of_400, of_500 = (rope_tables(config(scaling), 300, seq_len=n)[0] for n in (400, 500))
        assert torch.equal(of_400, of_500) == (scaling != "dynamic")
    default, short = (rope_tables(config(s), 256, seq_len=256)[0] for s in ("default", "dynamic"))
    assert torch.equal(default, short)


@pytest.mark.parametrize("rotary_dim", [64, 40])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_row_depends_on_its_position_alone(config, scaling, rotary_dim):
    """Neither on the size of the table nor on the number of threads."""
    config = config(scaling, rotary_dim=rotary_dim)
    threads, (long_cos, long_sin) = torch.get_num_threads(), rope_tables(config, 20001)
    for length in (1, 3, 17, 257, 10001, 20001):
        torch.set_num_threads(2)
        cos, sin = rope_tables(config, length)
        torch.set_num_threads(threads)
        assert torch.equal(cos, long_cos[:length]) and torch.equal(sin, long_sin[:length])


def test_longrope_changes_all_rows_with_the_length(config):
    config = config("longrope")
    short, long, decoding = (rope_tables(config, 260, seq_len=n)[0] for n in (250, 251, None))
    assert torch.equal(decoding[:250], short[:250]) and torch.equal(decoding[250:], long[250:])
    assert not torch.equal(short[1:10], long[1:10])


def test_query_scales(config):
    """1 + beta * log(1 + floor(position / n)), as in modeling_ministral3.py."""
    assert query_scales(config("default"), 10) is None
    scales = query_scales(config("default", query_scaling=(0.1, 16)), 100)
    expected = 1 + 0.1 * torch.log(1 + torch.floor(torch.arange(100) / 16))
    torch.testing.assert_close(scales, expected, rtol=0, atol=2**-22)
    assert scales.dtype == torch.float32 and len(scales.unique()) == 7


def test_partial_rotary(config):
    """The first rotary_dim dims rotate as a head of rotary_dim dims does."""
    partial = rope_tables(config("default", rotary_dim=32), 50)
    whole = rope_tables(config("default", rotary_dim=32, head_dim=32), 50)
    assert partial[0].shape == (50, 16) and all(map(torch.equal, partial, whole))
