"""config.json: both spellings, defaults, and one line for whatever makes no sense."""

import json
import math

import pytest
import torch
from conftest import TINY_CONFIG
from tiny_model import CONFIG, random_model

from river_ext.errors import RiverError
from river_ext.loading.config import ModelConfig, parse_dtype, read_config
from river_ext.loading.multipliers import MULTIPLIERS
from river_ext.loading.rope import rope_tables

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MINISTRAL3 = {"model_type": "ministral3"}
LONGROPE = {
    "model_type": "phi3",
    "original_max_position_embeddings": 64,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2] * 8},
}


def read(directory, generation=None, **changes) -> ModelConfig:
    """The config of TINY_CONFIG with changes; a change to ... deletes the key."""
    values = {key: value for key, value in (TINY_CONFIG | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return read_config(directory)


def refusal(directory, *words: str, **changes) -> str:
    with pytest.raises(RiverError) as caught:
        read(directory, **changes)
    message = str(caught.value)
    assert "\n" not in message and "config.json" in message
    for word in words:
        assert word in message, message
    return message


def test_values(tmp_path):
    assert read(tmp_path) == ModelConfig(
        model_type="llama", vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, rotary_dim=16, rms_norm_eps=1e-5,
        max_position_embeddings=256, rope_theta=10000.0, rope_scaling=None, tie_word_embeddings=False,
        attention_bias=False, dtype=torch.float32, bos_token_id=1, eos_token_ids=(2,), sliding_window=None,
    )  # fmt: skip


def test_defaults_of_absent_keys(tmp_path):
    absent = dict.fromkeys(
        ("num_key_value_heads", "rope_theta", "torch_dtype", "bos_token_id", "eos_token_id"), ...
    )
    config = read(tmp_path, **absent, tie_word_embeddings=...)
    assert config.num_key_value_heads == 4 and config.rope_theta == 10000.0 and not config.tie_word_embeddings
    assert config.dtype is None and config.bos_token_id is None and config.eos_token_ids == ()


@pytest.mark.parametrize(
    "old, new, scaling",
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}, None),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
            {"rope_type": "linear", "factor": 2.0},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            {"type": "dynamic", "rope_theta": 5e5, "factor": 4.0},
            {"rope_type": "dynamic", "factor": 4.0},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
            {"rope_type": "llama3", **LLAMA3},
        ),
    ],
)
def test_both_rope_spellings(tmp_path, old, new, scaling):
    for config in (read(tmp_path, **old), read(tmp_path, rope_theta=..., rope_parameters=new)):
        assert (config.rope_theta, config.rope_scaling) == (5e5, scaling)


def test_yarn(tmp_path):
    scaling = read(tmp_path, rope_scaling=YARN).rope_scaling
    assert scaling == {
        "rope_type": "yarn", "factor": 4.0, "attention_factor": pytest.approx(1 + 0.1 * math.log(4)),
        "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "original_max_position_embeddings": 64,
    }  # fmt: skip
    alike = {"beta_fast": None, "beta_slow": 0, "truncate": None, "attention_factor": None, "mscale": 2.0}
    assert read(tmp_path, rope_scaling=YARN | alike).rope_scaling == scaling  # mscale alone says nothing
    scales = read(tmp_path, rope_scaling=YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}).rope_scaling
    log = math.log(4)
    assert scales["attention_factor"] == pytest.approx((1 + 0.2 * log) / (1 + 0.05 * log))
    inferred = read(tmp_path, rope_scaling=YARN | {"factor": None}).rope_scaling
    assert inferred == scaling  # 256 positions over 64


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
def test_longrope(tmp_path, name):
    scaling = LONGROPE["rope_scaling"] | {"type": name}
    config = read(tmp_path, **LONGROPE | {"rope_scaling": scaling})
    assert config.rope_scaling == {
        "rope_type": "longrope", "short_factor": (1.0,) * 8, "long_factor": (2.0,) * 8,
        "attention_factor": pytest.approx(math.sqrt(1 + math.log(4) / math.log(64))),
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    assert (config.rotates_anew_after, config.longest_unscaled, config.max_length) == (64, 64, 256)
    scaling = {"attention_factor": 1.5, "factor": 8.0, **scaling}
    config = read(tmp_path, **LONGROPE | {"rope_scaling": scaling, "original_max_position_embeddings": ...})
    assert config.rope_scaling["attention_factor"] == 1.5
    assert config.rotates_anew_after == 4096  # what transformers has where the file says nothing


def test_llama3_original_length_may_stand_outside(tmp_path):
    scaling = {"rope_type": "llama3", **LLAMA3}
    inner = read(tmp_path, rope_scaling=scaling)
    outer = read(tmp_path, rope_scaling=scaling, original_max_position_embeddings=32)
    del scaling["original_max_position_embeddings"]
    neither = read(tmp_path, rope_scaling=scaling)
    lengths = [c.rope_scaling["original_max_position_embeddings"] for c in (inner, outer, neither)]
    assert lengths == [64, 32, 256]


def test_max_length(tmp_path):
    for kind, length in (("linear", 384), ("dynamic", 384)):
        assert read(tmp_path, rope_scaling={"type": kind, "factor": 1.5}).max_length == length
    assert read(tmp_path, rope_scaling={"rope_type": "llama3", **LLAMA3}).max_length == 256
    assert read(tmp_path, rope_scaling=YARN).max_length == 256
    assert read(tmp_path, rope_scaling=YARN | {"factor": 16.0}).max_length == 1024
    assert read(tmp_path).max_length == 256


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_spellings(tmp_path, key, dtype):
    config = read(tmp_path, **({"torch_dtype": ...} | {key: dtype}))
    assert config.dtype == getattr(torch, dtype) == parse_dtype(config.dtype, "") == parse_dtype(dtype, "")


def test_token_ids(tmp_path):
    assert read(tmp_path, eos_token_id=[5, 2, 5]).eos_token_ids == (5, 2)
    assert read(tmp_path, eos_token_id=None).eos_token_ids == ()
    # an id that the model cannot generate ends nothing
    assert read(tmp_path, eos_token_id=[96, -1, 7]).eos_token_ids == (7,)
    config = read(tmp_path, generation={"eos_token_id": [3, 4], "bos_token_id": 9, "temperature": 0.6})
    assert config.eos_token_ids == (3, 4) and config.bos_token_id == 9
    config = read(tmp_path, generation={"temperature": 0.6})
    assert config.eos_token_ids == (2,) and config.bos_token_id == 1


def test_families(tmp_path):
    assert read(tmp_path, model_type="qwen2").attention_bias
    assert not read(tmp_path, model_type="mistral", attention_bias=True, sliding_window=None).attention_bias
    assert read(tmp_path, model_type="qwen3").head_dim == 128
    assert read(tmp_path, head_dim=None).head_dim == 16
    assert read(tmp_path, head_dim=40).head_dim == 40


def test_multipliers(tmp_path):
    granite = {"model_type": "granite", "rms_norm_eps": 1e-5}
    names = "rms_norm_eps", "softmax_scale", "residual_multiplier", "logits_scaling"

    def fields(**changes):
        return tuple(getattr(read(tmp_path, **changes), name) for name in names)

    assert fields(rms_norm_eps=1e-5) == (1e-5, None, 1.0, 1.0)
    assert fields(**granite) == (1e-5, 1.0, 1.0, 1.0)  # transformers' defaults
    assert fields(**granite, attention_multiplier=0.125, residual_multiplier=0.22) == (1e-5, 0.125, 0.22, 1.0)
    assert fields(**granite, embedding_multiplier=4, logits_scaling=8) == (1e-5 / 16, 1.0, 0.25, 8.0)
    for key in MULTIPLIERS:
        for value in (0, -1, 1e5, "12", True):
            refusal(tmp_path, key, "a number from 0.0001 to 10000", **granite, **{key: value})


def test_what_new_families_imply(tmp_path):
    smollm3 = read(
        tmp_path, model_type="smollm3", num_hidden_layers=9, tie_word_embeddings=..., rope_theta=...
    )
    assert smollm3.nope_layers == (3, 7) and smollm3.tie_word_embeddings and smollm3.rope_theta == 2e6
    slides = {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 8}
    config = read(tmp_path, **slides, no_rope_layers=[0, 1, 1, 0])
    assert (config.nope_layers, config.sliding_window, config.full_attention_layers) == ((0,), 8, (1, 2))
    config = read(tmp_path, **slides, no_rope_layers=[1, 1, 1])
    assert (config.nope_layers, config.sliding_window, config.full_attention_layers) == ((), None, ())
    assert read(tmp_path, model_type="phi3", partial_rotary_factor=0.75).rotary_dim == 12
    assert read(tmp_path, model_type="phi3", sliding_window=32).sliding_window == 32
    rope = YARN | {"llama_4_scaling_beta": 0.1, "max_position_embeddings": 256}
    ministral3 = read(tmp_path, model_type="ministral3", rope_parameters=rope, rope_theta=...)
    assert ministral3.query_scaling == (0.1, 64) and ministral3.head_dim == 128
    assert read(tmp_path, model_type="ministral3", rope_scaling=YARN).query_scaling is None


def test_a_multimodal_config(tmp_path):
    text = TINY_CONFIG | {"model_type": "ministral3", "torch_dtype": None, "rope_scaling": YARN}
    outer = {"model_type": "mistral3", "dtype": "bfloat16", "text_config": text, "vision_config": {"x": 1}}

    def multimodal(**changes):
        (tmp_path / "config.json").write_text(json.dumps(outer | changes))
        return read_config(tmp_path)

    config = multimodal(architectures=["Mistral3ForConditionalGeneration"], image_token_index=10)
    assert config.multimodal and config.model_type == "ministral3" and config.dtype == torch.bfloat16
    assert config.hidden_size == 64 and not config.tie_word_embeddings
    assert multimodal(tie_word_embeddings=True).tie_word_embeddings
    del text["tie_word_embeddings"]
    assert multimodal().tie_word_embeddings  # as transformers has it
    for changes in ({"num_experts": 8}, {"quantization_config": {"quant_method": "fp8"}}):
        with pytest.raises(RiverError, match=f"{next(iter(changes))} is "):
            multimodal(**changes)
    with pytest.raises(RiverError, match="architectures is "):
        multimodal(architectures=["LlavaForConditionalGeneration"])


def test_sliding_window(tmp_path):
    assert read(tmp_path, sliding_window=256).sliding_window is None  # Llama has none
    assert read(tmp_path, sliding_window=32, use_sliding_window=False).sliding_window is None
    refusal(tmp_path, "sliding_window", "32", "256", sliding_window=32)
    assert read(tmp_path, model_type="mistral", sliding_window=32).sliding_window == 32
    assert read(tmp_path, model_type="mistral", sliding_window=None).sliding_window is None
    refusal(tmp_path, "sliding_window", "missing", model_type="mistral")
    qwen = {"model_type": "qwen2", "sliding_window": 32, "max_window_layers": 0}
    assert read(tmp_path, **qwen).sliding_window is None
    assert read(tmp_path, **qwen, use_sliding_window=True).sliding_window == 32
    assert read(tmp_path, **qwen | {"max_window_layers": 3}, use_sliding_window=True).sliding_window is None
    config = read(tmp_path, **qwen | {"max_window_layers": 1}, use_sliding_window=True)
    assert (config.sliding_window, config.full_attention_layers) == (32, (0,))
    layer_types = ["full_attention", "sliding_attention", "full_attention"]
    config = read(tmp_path, **qwen, use_sliding_window=True, layer_types=layer_types)
    assert (config.sliding_window, config.full_attention_layers) == (32, (0, 2))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "gpt2"}, ("model_type", "gpt2", "llama")),
        ({"model_type": ...}, ("model_type", "missing", "llama")),
        ({"model_type": ["llama"]}, ("model_type",)),
        ({"hidden_act": "gelu"}, ("hidden_act", "gelu", "silu")),
        ({"mlp_bias": True}, ("mlp_bias", "false")),
        ({"quantization_config": {"quant_method": "awq"}}, ("quantization_config", "awq", "bfloat16")),
        ({"torch_dtype": "float64"}, ("torch_dtype", "float64", "bfloat16, float16, float32")),
        ({"dtype": "int8"}, ("int8", "bfloat16")),
        ({"dtype": 16}, ("16", "bfloat16")),
        ({"hidden_size": 100}, ("hidden_size", "100", "multiple of 64")),
        ({"hidden_size": 64.0}, ("hidden_size", "64.0", "integer")),
        ({"hidden_size": "64"}, ("hidden_size", '"64"', "integer")),
        ({"hidden_size": True}, ("hidden_size", "true", "integer")),
        ({"hidden_size": ...}, ("hidden_size", "missing", "integer")),
        ({"hidden_size": 1 << 40}, ("hidden_size", "65536")),
        ({"num_hidden_layers": 0}, ("num_hidden_layers", "0")),
        ({"num_hidden_layers": 10**9}, ("num_hidden_layers", "1024")),
        ({"vocab_size": -5}, ("vocab_size", "-5")),
        ({"vocab_size": 10**30}, ("vocab_size", "16777216")),
        ({"intermediate_size": 10**12}, ("intermediate_size", "1048576")),
        ({"max_position_embeddings": 10**12}, ("max_position_embeddings", "16777216")),
        ({"num_key_value_heads": 3}, ("num_key_value_heads", "3", "divisor", "4")),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, ("head_dim", "missing")),
        ({"num_attention_heads": 64, "num_key_value_heads": 2}, ("head_dim", "even", "1")),
        ({"head_dim": 15}, ("head_dim", "15", "even")),
        ({"head_dim": 100000}, ("head_dim", "256")),
        ({"rms_norm_eps": -1e-5}, ("rms_norm_eps",)),
        ({"rms_norm_eps": "1e-5"}, ("rms_norm_eps", "number")),
        ({"rms_norm_eps": float("nan")}, ("rms_norm_eps", "NaN")),
        ({"rope_theta": 0}, ("rope_theta", "0")),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, ("rope_scaling.type", "longrope", "yarn")),
        ({"rope_scaling": {"type": "linear"}}, ("rope_scaling.factor", "missing")),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, ("rope_scaling.factor", "0.5")),
        ({"rope_scaling": {"type": "dynamic", "factor": float("inf")}}, ("rope_scaling.factor", "Infinity")),
        ({"max_position_embeddings": 9999, "rope_scaling": {"type": "linear", "factor": 9e3}}, ("9000",)),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, ("dynamic", "head_dim")),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ("low_freq_factor", "missing")),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, ("high_freq",)),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4 - 1e-9}}, ("high_freq",)),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, ("rope_scaling.type", "yarn", "rope_theta above 1")),
        ({"rope_scaling": YARN | {"factor": 0.5}}, ("rope_scaling.factor", "0.5")),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, ("rope_scaling.beta_fast", "0.5", "beta_slow, 1")),
        ({"rope_scaling": YARN | {"truncate": "no"}}, ("rope_scaling.truncate", "true or false")),
        ({"rope_scaling": YARN | {"attention_factor": 0}}, ("rope_scaling.attention_factor", "0.001")),
        ({"rope_scaling": YARN | {"factor": 1e4, "original_max_position_embeddings": 9999}}, ("16777216",)),
        ({"rope_scaling": YARN | {"llama_4_scaling_beta": 0.1}}, ("rope_scaling.llama_4_scaling_beta",)),
        (LONGROPE | {"rope_scaling": {"type": "longrope"}}, ("rope_scaling.short_factor", "missing", "8")),
        (LONGROPE | {"partial_rotary_factor": 0.5}, ("rope_scaling.short_factor", "array of 4 numbers")),
        (LONGROPE | {"partial_rotary_factor": 0.2}, ("partial_rotary_factor", "0.2", "16 dims")),
        (LONGROPE | {"partial_rotary_factor": 0}, ("partial_rotary_factor", "16 dims")),
        (LONGROPE | {"original_max_position_embeddings": 1}, ("original_max_position_embeddings", "from 2")),
        (
            LONGROPE | {"rope_scaling": LONGROPE["rope_scaling"] | {"long_factor": [1.0] * 7 + ["x"]}},
            ("rope_scaling.long_factor.7", '"x"', "number"),
        ),
        ({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}}, ("longrope", "linear")),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, ("no_rope_layers", "array of 3")),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0, 2]}, ("no_rope_layers", "array of 3")),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, ("no_rope_layer_interval", "0")),
        (MINISTRAL3, ("rope_parameters", "missing", "object with rope_type")),
        ({"model_type": "mistral3"}, ("text_config", "missing")),
        ({"model_type": "mistral3", "text_config": {"model_type": "llama"}}, ("text_config.model_type",)),
        (
            {"model_type": "mistral3", "text_config": TINY_CONFIG | MINISTRAL3 | {"head_dim": 3}},
            ("text_config.head_dim", "3", "even"),
        ),
        ({"rope_scaling": {"factor": 8.0}}, ("rope_scaling.factor", "8.0", "rope_type")),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 1.2}}, ("attention_factor",)),
        ({"rope_scaling": {"type": "default", "mrope_section": [1, 1]}}, ("mrope_section", "rope_type")),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"factor": 4.0}},
            ("rope_scaling.factor", "2.0", "rope_parameters.factor"),
        ),
        ({"rope_scaling": [1]}, ("rope_scaling", "object")),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ("all layers",)),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ("partial_rotary_factor", "0.5")),
        ({"tie_word_embeddings": "yes"}, ("tie_word_embeddings", "true or false")),
        ({"eos_token_id": "</s>"}, ("eos_token_id", "</s>")),
    ],
)  # fmt: skip
def test_refusals(tmp_path, changes, words):
    refusal(tmp_path, *words, **changes)


# (changes just inside a limit of the kernels, changes just outside, what the refusal names)
KERNEL_LIMITS = {
    "group": (
        {"num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": 2},
        {"num_attention_heads": 65, "num_key_value_heads": 1, "head_dim": 2},
        ("num_attention_heads", "65", "64 times num_key_value_heads, 1"),
    ),
    "group of 2": (
        {"num_attention_heads": 128, "num_key_value_heads": 2, "head_dim": 2},
        {"num_attention_heads": 130, "num_key_value_heads": 2, "head_dim": 2},
        ("num_attention_heads", "130", "64 times num_key_value_heads, 2"),
    ),
    "head_dim": ({"head_dim": 256}, {"head_dim": 258}, ("head_dim", "258", "256")),
    "heads": (
        {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16},
        {"num_attention_heads": 3, "num_key_value_heads": 2, "head_dim": 16},
        ("num_key_value_heads", "2", "divisor of num_attention_heads, 3"),
    ),
    "hidden_size": ({"hidden_size": 128}, {"hidden_size": 96}, ("hidden_size", "96", "multiple of 64")),
    "smallest hidden_size": ({"hidden_size": 64}, {"hidden_size": 32}, ("hidden_size", "32", "64")),
}


@pytest.mark.parametrize("limit", KERNEL_LIMITS)
def test_what_the_kernels_refuse_is_refused_with_the_config(tmp_path, limit):
    inside, outside, words = KERNEL_LIMITS[limit]
    read(tmp_path, **inside)
    refusal(tmp_path, *words, **outside)
    sizes = {"num_hidden_layers": 1, "intermediate_size": 64}

    def steps(changes):
        sized = CONFIG | sizes | changes
        sized["rotary_dim"] = sized["head_dim"] // 2 * 2
        model = random_model(**{key: sized[key] for key in sized if key != "dtype"})
        for mode in ("full", "full_w4"):
            model.generate([1, 2], max_new_tokens=3, mode=mode)

    steps(inside)
    with pytest.raises(RuntimeError, match="river::"):  # the limit is the ops' own
        steps(outside)


@pytest.mark.parametrize("theta", [1.0, 1e12])
@pytest.mark.parametrize("positions", [1, 1 << 10])
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 1e4},
        {"rope_type": "dynamic", "factor": 1e4},
        {"rope_type": "llama3", "factor": 1e4, "low_freq_factor": 1e-3, "high_freq_factor": 1e6},
        {"rope_type": "llama3", "factor": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 1 + 2e-7},
        {"rope_type": "yarn", "factor": 1e4, "original_max_position_embeddings": 1, "beta_fast": 1e6},
        {
            "rope_type": "yarn",
            "attention_factor": 1e3,
            "beta_fast": 1e-3,
            "beta_slow": 1e-3,
            "truncate": False,
        },
    ],
)
def test_numbers_at_their_limits_give_finite_tables(tmp_path, scaling, positions, theta):
    """All of them are checked as fp64 and used in fp32."""
    if scaling["rope_type"] == "yarn":
        theta = max(theta, 1 + 1e-6)
    for head_dim in (4, 256):
        config = read(
            tmp_path,
            rope_scaling=scaling,
            rope_theta=theta,
            max_position_embeddings=positions,
            head_dim=head_dim,
        )
        for seq_len in (None, config.max_length):
            for table in rope_tables(config, min(config.max_length, 3000), seq_len=seq_len):
                assert table.isfinite().all()


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ("not valid JSON",)),
        ("{", ("not valid JSON",)),
        ("[" * 100000, ("not valid JSON",)),
        ("9" * 10000, ("not valid JSON",)),
        ("[1]", ("object", "array")),
        ("null", ("object", "null")),
        ("3", ("object", "number")),
        ("\xff\xfe", ("not valid JSON",)),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_files_that_hold_no_object(tmp_path, name, text, words):
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(RiverError) as caught:
        read_config(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path / name) in message
    assert all(word in message for word in words), message


def test_no_directory_and_no_config(tmp_path):
    with pytest.raises(RiverError, match="absent: no such directory"):
        read_config(tmp_path / "absent")
    with pytest.raises(RiverError, match="config.json: missing"):
        read_config(tmp_path)


def test_a_hub_name_is_not_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RiverError) as caught:
        read_config("meta-llama/Llama-3.2-1B")
    assert "download it first: hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B" in str(
        caught.value
    )
    for name in ("./a/b", "/a/b", "a/b/c", "plain", "a" * 5000, "x/" + "y" * 300):
        with pytest.raises(RiverError, match="no such directory"):
            read_config(name)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text("a file")
    with pytest.raises(RiverError) as caught:
        read_config("org/name")
    assert "download" not in str(caught.value)
    for name in ("", None, 7, "a\0b", "\ud800", b"bytes"):
        with pytest.raises(RiverError, match="accepted: the path of"):
            read_config(name)


def test_the_size_of_a_json_file_is_bounded(tmp_path):
    read(tmp_path)
    with open(tmp_path / "config.json", "r+b") as file:
        file.truncate(10 << 30)  # a hole: it takes no room
    with pytest.raises(RiverError, match="config.json: larger than 64 MiB"):
        read_config(tmp_path)


def test_remote_code_is_ignored(tmp_path):
    (tmp_path / "modeling_custom.py").write_text("raise SystemExit('executed')")
    changes = {"auto_map": {"AutoModelForCausalLM": "modeling_custom.Model"}, "trust_remote_code": True}
    assert read(tmp_path, **changes) == read(tmp_path)


def test_unprintable_names_stay_on_one_line(tmp_path):
    assert "\x1b" not in refusal(tmp_path, model_type="a\nb\x1b[31m")
    with pytest.raises(RiverError) as caught:
        raise RiverError("a\nb\x1b[31m\u202e")
    assert str(caught.value) == "a b?[31m?"
