"""Keys of config.json that would change the arithmetic, by their values, and keys that are free."""

import json

import pytest
from conftest import TINY_CONFIG
from test_config import read, refusal

from river_ext.errors import RiverError
from river_ext.loading.config import read_config
from river_ext.loading.families import FAMILIES, MULTIMODAL, NOT_SUPPORTED

# key: (values that change nothing, values that change the arithmetic)
FOREIGN_KEYS = {
    "attn_logit_softcapping": ((None, 0, 0.0), (50.0,)),
    "final_logit_softcapping": ((None,), (30.0,)),
    "logits_soft_cap": ((None,), (30,)),
    "logit_scale": ((None, 1, 1.0), (0.0625, 0)),
    "logits_scaling": ((1.0,), (8.0,)),
    "embedding_multiplier": ((1.0,), (12.0, 0)),
    "residual_multiplier": ((1,), (0.22,)),
    "attention_multiplier": ((None, 0.25), (0.0078125, 1.0, 10**400)),
    "query_pre_attn_scalar": ((None, 16), (256,)),
    "scale_emb": ((1,), (12,)),
    "scale_depth": ((1.0,), (1.4,)),
    "scale_embedding": ((False,), (True,)),
    "mup_width_multiplier": ((None, 1.0), (8.0,)),
    "use_mup": ((False,), (True,)),
    "num_experts": ((None, 0), (8, 1)),
    "num_local_experts": ((0,), (8,)),
    "n_routed_experts": ((None,), (64,)),
    "moe_intermediate_size": ((None, 0), (1408,)),
    "use_qk_norm": ((None, False), (True,)),
    "qk_layernorm": ((False,), (True,)),
    "no_rope_layers": ((None, [], [1, 1, 1]), ([1, 1, 0], [0, 0, 0])),
    "no_rope_layer_interval": ((None, 0), (4,)),
    "compression_config": ((None, {}), ({"format": "pack-quantized"},)),
    "quantization": ((None,), ({"group_size": 64, "bits": 4},)),
    "clip_qkv": ((None,), (8.0,)),
    "use_parallel_residual": ((False,), (True,)),
    "parallel_attn": ((False,), (True,)),
    "use_post_norm": ((False,), (True,)),
    "apply_residual_connection_post_layernorm": ((False,), (True,)),
    "norm_type": (("rmsnorm", "RMSNorm"), ("layernorm", 3)),
    "norm_add_unit_offset": ((False,), (True,)),
    "layer_types": ((None, ["full_attention"] * 3), (["full_attention", "sliding_attention"] * 2, [], "x")),
    "attention_chunk_size": ((None, 0), (8192,)),
    "attn_temperature_tuning": ((False,), (True,)),
    "sliding_window_pattern": ((None,), (6,)),
    "attention_sinks": ((None, False), (4,)),
    "rope_interleaved": ((False,), (True,)),
    "partial_rotary_factor": ((1.0, 1), (0.25,)),
    "rotary_pct": ((1.0,), (0.25,)),
    "rotary_dim": ((None, 16), (8,)),
    "rotary_emb_base": ((None, 10000, 10000.0), (500000,)),
    "rope_local_base_freq": ((10000.0,), (1000000,)),
    "use_rope": ((True, None), (False,)),
    "alibi": ((False,), (True,)),
    "position_embedding_type": (("rope",), ("absolute", "alibi")),
    "use_dynamic_ntk": ((False,), (True,)),
    "use_logn_attn": ((False,), (True,)),
    "kv_lora_rank": ((None,), (512,)),
    "v_head_dim": ((None, 16), (128,)),
    "is_causal": ((True,), (False,)),
    "use_bidirectional_attention": ((False,), (True,)),
    "add_cross_attention": ((False,), (True,)),
    "hidden_act": (("silu", "swish", None), ("gelu_pytorch_tanh", "relu2")),
    "hidden_activation": ((None, "silu"), ("gelu_pytorch_tanh",)),
    "swiglu_limit": ((None,), (7.0,)),
    "mamba_d_state": ((None,), (128,)),
    "linear_num_key_heads": ((None,), (16,)),
    "conv_L_cache": ((None,), (3,)),
    "full_attn_idxs": ((None, []), ([0, 2],)),
    "text_config": ((None, {}), ({"model_type": "llama"},)),
    "attn_config": ((None,), ({"clip_qkv": 8},)),
    "hidden_size_per_layer_input": ((0,), (256,)),
    "num_kv_shared_layers": ((0,), (20,)),
    "mlp_type": ((None, "swiglu"), ("relu2", "default")),
    "ffn_type": ((None,), ("gelu",)),
    "mlp_hidden_act": (("silu",), ("relu2",)),
    "swiglu_alpha": ((None,), (1.7, 1.0)),
    "logit_temperature": ((None, 1.0), (2.0,)),
    "attn_temperature": ((1.0,), (2.0,)),
    "query_key_scaling": ((None, False), (True,)),
    "value_scale": ((1.0,), (0.5,)),
    "pre_norm": ((None, True), (False,)),
    "use_pre_norm": ((True,), (False,)),
    "norm_after": ((False,), (True,)),
    "use_swiglu": ((True,), (False,)),
    "glu": ((True,), (False,)),
    "gated_mlp": ((True,), (False,)),
    "skip_layers": ((None, []), ([3],)),
    "loop_count": ((None, 1), (2,)),
    "num_loops": ((1,), (3,)),
    "cross_layer_attention": ((None, False), (True, 2)),
    "kv_sharing": ((False,), (True,)),
    "sparse_attention": ((None,), (True, {"block": 64})),
    "relative_attention": ((False,), (True,)),
    "dual_chunk_attention_config": ((None,), ({"chunk_size": 262144},)),
    "weight_bits": ((None, 16), (1,)),
    "input_bits": ((None,), (8,)),
    "bits": ((None,), (4,)),
    "quant_method": ((None,), ("awq",)),
    "is_encoder_decoder": ((False,), (True,)),
    "numExperts": ((0,), (8,)),
    "num-experts": ((0,), (8,)),
}


@pytest.mark.parametrize("key", FOREIGN_KEYS)
def test_keys_that_change_the_arithmetic_are_refused_by_name(tmp_path, key):
    neutral, harmful = FOREIGN_KEYS[key]
    for value in neutral:
        assert read(tmp_path, **{key: value}) == read(tmp_path), value
    for value in harmful:
        refusal(tmp_path, f": {key} is ", "accepted: ", **{key: value})
    if key != "layer_types" and key != "use_rope" and key != "is_causal":
        refusal(tmp_path, f": {key} is ", **{key: {"a": [1]}})


def test_what_is_neutral_depends_on_the_family(tmp_path):
    qwen3 = {"model_type": "qwen3", "head_dim": 16}
    assert read(tmp_path, **qwen3, use_qk_norm=True).model_type == "qwen3"
    granite = {"model_type": "granite", "residual_multiplier": 0.22}
    assert read(tmp_path, **granite).residual_multiplier == 0.22
    refusal(tmp_path, "attn_scale", **granite, attn_scale=0.5)
    refusal(tmp_path, "use_qk_norm", "false", **qwen3, use_qk_norm=False)
    mistral = {"model_type": "mistral", "sliding_window": 32}
    assert read(tmp_path, **mistral, layer_types=["sliding_attention"] * 3).sliding_window == 32
    assert read(tmp_path, **mistral, layer_types=["full_attention"] * 3).sliding_window is None
    refusal(tmp_path, "layer_types", **mistral, layer_types=["sliding_attention"] * 2)
    refusal(tmp_path, "layer_types", **mistral, layer_types=["sliding_attention", "x", "full_attention"])
    ministral3 = {"model_type": "ministral3", "sliding_window": 32, "rope_scaling": {"type": "default"}}
    assert read(tmp_path, **ministral3, layer_types=["sliding_attention"] * 3).sliding_window == 32
    refusal(tmp_path, "layer_types", **ministral3, layer_types=["full_attention"] * 3)
    refusal(tmp_path, "layer_types", model_type="qwen2", layer_types=["sliding_attention"] * 3)


@pytest.mark.parametrize("model_type", NOT_SUPPORTED)
def test_what_is_not_supported_is_refused_with_the_reason(tmp_path, model_type):
    """By the name that transformers has for it."""
    transformers = pytest.importorskip("transformers")
    assert model_type in transformers.CONFIG_MAPPING
    transformers.AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(RiverError) as caught:
        read_config(tmp_path)
    message = str(caught.value)
    assert f'model_type is "{model_type}"; accepted: granite, llama, ' in message
    assert message.endswith(NOT_SUPPORTED[model_type]) and "\n" not in message


def test_an_architecture_of_another_family(tmp_path):
    for fine in (
        None,
        [],
        ["LlamaForCausalLM"],
        "LlamaForCausalLM",
        ["TinyLlamaModel"],
        ["X", "LlamaForTasks"],
    ):
        assert read(tmp_path, architectures=fine) == read(tmp_path)
    for other in (["BitnetForCausalLM"], "Qwen2ForCausalLM", [None], {"a": 1}, 3):
        refusal(tmp_path, ": architectures is ", "accepted: a class of llama models", architectures=other)
    assert read(tmp_path, model_type="qwen2", architectures=["Qwen2ForCausalLM"]).model_type == "qwen2"


BOOKKEEPING = {
    "architectures": ["LlamaForCausalLM"], "_name_or_path": "somebody/something",
    "transformers_version": "4.46", "attention_dropout": 0.1, "hidden_dropout": 0.1, "resid_pdrop": 0.1,
    "initializer_range": 0.02,
    "use_cache": True, "pretraining_tp": 2, "pad_token_id": 0, "output_router_logits": False,
    "router_aux_loss_coef": 0.001, "unsloth_version": "2024.9", "unsloth_fixed": True,
    "is_llama_config": True,
    "_attn_implementation": "eager", "attn_implementation": "flash_attention_2", "use_flash_attn": True,
    "_flash_attn_2_enabled": True, "use_mrope": False, "gradient_checkpointing": True,
    "gradient_clipping": 1.0,
    "activation_checkpointing": True, "torchscript": False, "use_bfloat16": True, "is_decoder": True,
    "id2label": {"0": "LABEL_0"}, "problem_type": None, "tokenizer_class": "LlamaTokenizer",
    "pruned_heads": {},
    "task_specific_params": None, "chunk_size_feed_forward": 0, "temperature": 0.7, "top_k": 50,
    "repetition_penalty": 1.1, "max_sequence_length": 4096, "model_max_length": 4096, "num_labels": 2,
    "layer_norm_eps": 1e-5, "rms_norm": 1, "head_size": 16, "ffn_dim_multiplier": 1.3,
    "multiple_of": 256,
    "neftune_noise_alpha": 5, "_pre_quantization_dtype": "float16", "max_window_layers": 28,
    "mup": None,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "merged_adapter": "x",
    "license": "mit",
    "num_nextn_predict_layers": 1,
    "language": ["en"], "vocab_padding": 64, "seed": 1, "ema": 0.999,
}  # fmt: skip


@pytest.mark.parametrize("key", BOOKKEEPING)
def test_other_keys_are_free(tmp_path, key):
    assert read(tmp_path, **{key: BOOKKEEPING[key]}) == read(tmp_path)


@pytest.mark.parametrize(
    "model_type",
    [
        "cohere", "deepseek_v3", "exaone4", "falcon", "gemma2", "gpt_neox", "gpt_oss", "granite",
        "llama4_text",
        "mamba2", "minicpm3", "mixtral", "nanochat", "olmo3", "olmoe", "persimmon", "qwen3_moe", "qwen3_next",
        "smollm3",
    ],
)  # fmt: skip
def test_other_architectures_that_go_by_the_name_of_llama(tmp_path, model_type):
    """What their keys add is seen, whatever model_type says."""
    transformers = pytest.importorskip("transformers")
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not know it")
    values = transformers.AutoConfig.for_model(model_type).to_dict()
    values = {key: value for key, value in values.items() if not key.startswith("rope_")} | TINY_CONFIG
    values |= {"model_type": "llama", "hidden_act": "silu", "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    with pytest.raises(RiverError, match=r"config.json: \w+ is .*; accepted: "):
        read_config(tmp_path)


@pytest.mark.parametrize("model_type", [*FAMILIES, *MULTIMODAL])
def test_what_transformers_writes_for_a_family_is_read(tmp_path, model_type):
    """Its config class knows no key that is refused at its default."""
    transformers = pytest.importorskip("transformers")
    text = MULTIMODAL.get(model_type, (model_type,))[0]
    transformers.AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    assert read_config(tmp_path).model_type == text
    transformers.AutoConfig.for_model(model_type).to_json_file(tmp_path / "config.json", use_diff=False)
    assert read_config(tmp_path).model_type == text
