"""The accepted families of models, and what keys of a config.json would say that a model is none of them.

Checkpoints of a derived architecture often go by the model_type that they were derived from, and then
transformers ignores what they add. A key that names a change of the arithmetic is therefore refused unless
its value says that there is no such change. Which names do so is told by their words (`ARITHMETIC`), since
no list can hold what is yet to be invented; all other keys that are not read are free, as configs are full
of bookkeeping. What adds, drops or reshapes tensors shows in the tensors as well (checkpoint.py).
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .json_object import Reader
from .multipliers import MULTIPLIERS

if TYPE_CHECKING:
    from .config import ModelConfig


@dataclass(frozen=True)
class Family:
    """What a model_type implies beyond the keys of its config.json, and which optional tensors it has."""

    qkv_bias: bool | None = None  # None: the key attention_bias decides
    o_bias: bool = True  # o has a bias where q, k and v have one
    qk_norm: bool = False
    multipliers: bool = False  # the keys of multipliers.py count
    # "key": sliding_window itself, which must be there; "optional": the same, or none; "switch": only if
    # use_sliding_window; None: no layer has one
    sliding_window: str | None = None
    layer_types: bool = False  # that key may give a layer a window, or none, of its own
    nope: bool = False  # layers may do without RoPE
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads
    tied: bool = False  # what tie_word_embeddings is where the file does not say
    fused: bool = False  # q, k and v are one tensor in the file, gate and up another
    # positions
    rope_types: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn")
    rope_theta: float = 10000.0  # where the file does not say
    partial_rotary: bool = False  # only a part of a head's dims may rotate
    original_positions: int | None = None  # where the file does not say; None: max_position_embeddings
    query_scale: bool = False  # the queries may grow with the position


# A family belongs here once test_hf_parity.py compares it with transformers.
FAMILIES = {
    "granite": Family(multipliers=True),
    "llama": Family(),
    "mistral": Family(qkv_bias=False, sliding_window="key", layer_types=True),
    "qwen2": Family(qkv_bias=True, o_bias=False, sliding_window="switch", layer_types=True),
    "qwen3": Family(qk_norm=True, sliding_window="switch", layer_types=True, default_head_dim=128),
    "phi3": Family(
        qkv_bias=False,
        sliding_window="optional",
        fused=True,
        rope_types=("default", "longrope", "su", "yarn"),  # the last three are one
        partial_rotary=True,
        original_positions=4096,
    ),
    "ministral": Family(qkv_bias=False, sliding_window="key", layer_types=True),
    "ministral3": Family(qkv_bias=False, sliding_window="optional", default_head_dim=128, query_scale=True),
    "smollm3": Family(sliding_window="switch", layer_types=True, nope=True, tied=True, rope_theta=2000000.0),
}

# Models that hold one of a family as their text_config, and what else: only the text model is read.
MULTIMODAL = {"mistral3": ("mistral", "ministral3")}

# Read by config.py, which checks them itself
READ_KEYS = {
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "mlp_bias", "hidden_act",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "quantization_config",
}  # fmt: skip
NOPE_KEYS = {"no_rope_layers", "no_rope_layer_interval"}
READ_ROPE_KEYS = {
    "type", "rope_type", "rope_theta", "factor", "partial_rotary_factor", "low_freq_factor",
    "high_freq_factor", "original_max_position_embeddings",
}  # fmt: skip
FREE_ROPE_KEYS = {"finetuned", "max_position_embeddings"}

OFF = (None, False, 0, "", [], {})
ONE = (None, False, 1)

Neutral = Callable[["ModelConfig"], tuple]


def _always(*values) -> Neutral:
    return lambda config: values


# (words in a key, the values that change nothing). The first row that matches a key decides.
ARITHMETIC: tuple[tuple[str, Neutral], ...] = (
    # training, bookkeeping and what follows from other keys
    (
        r"dropout|loss|jitter|grad|optim|learning_rate|pretraining|^ffn_dim_multiplier$|pre_quantiz",
        lambda config: None,
    ),
    # scores and logits
    (r"soft_?cap|capping|logits?_cap|tanh_cap|clip|clamp|(swiglu|glu|act)_limit", _always(*OFF)),
    (
        r"attention_multiplier|(attn|attention|softmax)_scal(e|ing)$",
        lambda config: (None, False, config.head_dim**-0.5),
    ),
    (r"query_pre_attn_scalar", lambda config: (None, config.head_dim)),
    (
        r"multiplier|(^|_)mup|logits?_scal|scale_logits"
        r"|(embed\w*|residual|input|output|width|depth|layer)_scal"
        r"|scale_(emb|depth|width|residual)|normalize_embed|dim_model_base"
        r"|(logits?|softmax|attn|attention)_temperature|(query_?key|value|head|attn_head)_scal(e|ing)",
        _always(*ONE),
    ),
    # positions
    (r"no_?rope|nope", lambda config: (*OFF, [1] * config.num_hidden_layers)),
    (r"^use_(rope|rotary\w*)$|^rope$|^rotary$", _always(None, True)),
    (r"(rope|rotary)_(pct|percent\w*|ratio|factor|scaling_factor)$", _always(None, 1)),
    (r"^(rope|rotary)_(ndims|dims?)$", lambda config: (None, config.rotary_dim)),
    (r"(rope|rotary)\w*_(base|freq)$", lambda config: (None, int(config.rope_theta), config.rope_theta)),
    (r"^rope_type$", _always(None, "default")),
    (r"position_embedding_type|pos_emb", _always(None, "rope", "rotary")),
    (r"rope|rotary|alibi|xpos|logn|(^|_)ntk|yarn|longrope|temperature_tuning", _always(*OFF)),
    # norms and the order of a block
    (
        r"q_?k_?(layer_?)?norm|query_key_(layer_?)?norm|^qk_ln",
        lambda config: (None, True) if FAMILIES[config.model_type].qk_norm else OFF,
    ),
    (
        r"norm_?(type|class|name)$|^normalization(_type)?$",
        _always(None, "rmsnorm", "rms_norm", "RMSNorm", "RmsNorm", "rms"),
    ),
    (r"pre_?norm|norm_(first|before)|normalize_before", _always(None, True)),
    (r"norm_(after|last)", _always(*OFF)),
    (r"norm\w*(offset|unit|plus_one)|zero_cent|layernorm_1p", _always(*OFF)),
    (
        r"parallel_(residual|attn|attention|block)|sandwich|(use|has|apply)_\w*post\w*_?norm|post_layernorm"
        r"|post_norm|(pre|post)_(feedforward|ffn)|hyper_connection|value_residual|altup|laurel",
        _always(*OFF),
    ),
    # which layers there are, and what they share
    (
        r"(text|vision|audio|language|llm|attn|ffn)_config$|per_layer|block_configs|shared_kv|kv_shared"
        r"|share_kv|kv_sharing|cross_layer|cla_share|layer_sharing|share_layers|skip_layer|layer_skip"
        r"|(^|_)recurren|pruned_heads|is_encoder_decoder",
        _always(*OFF),
    ),
    (r"(num|n)_loops?$|loop_count|loops?_num", _always(*ONE)),
    # attention of another kind
    (r"is_causal|^causal$", _always(None, True)),
    (r"v_head_dim", lambda config: (None, config.head_dim)),
    (
        r"(attn|attention)_types?$",
        _always(None, "full", "full_attention", "softmax", "gqa", "mha", "mqa", "causal"),
    ),
    (
        r"sink|attention_chunk|attn_chunk|local_(attention|attn|window)|window_(size|pattern)|sliding"
        r"|attention_window|attn_window|linear_(attn|attention|key|value|num|conv)|(kv|q)_lora|(^|_)mla(_|$)"
        r"|lightning|differential|bidirectional|prefix_lm|cross_attention|attn_(idx|layer)"
        r"|(sparse|relative|chunk|chunked)_(attn|attention)|dual_chunk",
        _always(*OFF),
    ),
    # feed-forward layers of another kind
    (r"(^|_)experts?(_|$)|(^|_)moe(_|$)|router|mixture_of", _always(*OFF)),
    (
        r"hidden_activation|activation_(function|fn|type)|^activation$|act_fn|(mlp|ffn|ff)_(hidden_)?act"
        r"|^(mlp|ffn|ff)_type$",
        _always(None, "silu", "swish", "swiglu"),
    ),
    (r"(use|is|has)_\w*glu$|^\w*glu$|gated_(mlp|ffn)|(mlp|ffn)_gated", _always(None, True)),
    (r"glu_alpha|glu_beta", _always(None, False)),
    (r"(^|_)mamba|(^|_)ssm(_|$)|rwkv|retnet|hyena|state_space|(^|_)conv_", _always(*OFF)),
    # weights that are not what they seem
    (r"quantiz|compress|sparsif|sparsity|kv_cache_scheme|quant_(method|type|config)", _always(*OFF)),
    (r"^(w|a|weight|input|activation)?_?bits$", _always(None, False, 16, 32)),
)
_PATTERNS = [(re.compile(words), neutral) for words, neutral in ARITHMETIC]


_GEMMA = "its activation is GELU, and its norms multiply by 1 + weight"
_POST_NORMS = f"{_GEMMA}; what a part makes is normalised, too, before it is added to the hidden vector"
# Architectures that people will try, and what they have that decoder blocks have not
NOT_SUPPORTED = {
    "gemma": _GEMMA,
    "gemma2": _POST_NORMS,
    "gemma3": _POST_NORMS,
    "gemma3_text": _POST_NORMS,
    "granitemoe": "it has layers of experts",
    "granitemoeshared": "it has layers of experts",
    "granitemoehybrid": "it has layers of experts, or of Mamba",
}


def refuse_known_architectures(top: Reader) -> None:
    """Refuses those of `NOT_SUPPORTED` with the reason."""
    name = top.values.get("model_type")
    if isinstance(name, str) and name in NOT_SUPPORTED:
        top.fail("model_type", f"{', '.join(FAMILIES)}. Not this one: {NOT_SUPPORTED[name]}")


def refuse_foreign_keys(top: Reader, config: "ModelConfig") -> None:
    """Refuses a key that changes the arithmetic of the family's models, unless its value changes nothing."""
    family = FAMILIES[config.model_type]
    read = READ_KEYS.union(NOPE_KEYS if family.nope else (), MULTIPLIERS if family.multipliers else ())
    for key, value in top.values.items():
        if key in read:
            continue
        neutral = neutral_values(key, config)
        if neutral is not None and not any(_equal(value, other) for other in neutral):
            listed = ", ".join(dict.fromkeys(json.dumps(other) for other in neutral))
            top.fail(key, f"{listed}, or no such key: {config.model_type} models have nothing else")


def refuse_foreign_architectures(top: Reader) -> None:
    """`architectures` names classes: one of another family is a model that only goes by this model_type."""
    value, family = top.values.get("architectures"), top.values["model_type"]
    names = [value] if isinstance(value, str) else value
    if names in (None, []):
        return
    if not isinstance(names, list) or not any(isinstance(n, str) and family in n.lower() for n in names):
        top.fail("architectures", f"a class of {family} models, whose name has that in it, or no such key")


def refuse_foreign_rope_keys(rope: Reader, own: set[str]) -> None:
    """The same for the object that rope_scaling or rope_parameters is: all its keys are arithmetic.

    `own` are keys that its rope_type or family has beyond those of all.
    """
    read = READ_ROPE_KEYS | own
    for key, value in rope.values.items():
        if key not in read | FREE_ROPE_KEYS and not any(_equal(value, other) for other in ONE):
            rope.fail(key, f"no such key; those that are read: {', '.join(sorted(read))}")


def neutral_values(key: str, config: "ModelConfig") -> tuple | None:
    """The values that change nothing of a key that names arithmetic; None for a key that does not."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower().replace("-", "_")
    return next((neutral(config) for pattern, neutral in _PATTERNS if pattern.search(words)), None)


def _equal(one, other) -> bool:
    """true is not 1, but 1.0 is, and so is what differs from it by rounding alone."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return other - 1e-6 * abs(other) <= one <= other + 1e-6 * abs(other)
    return one == other
