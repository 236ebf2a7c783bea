"""The weights of a model, as plain tensors grouped the way the ops take them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class DecoderBlockWeights:
    """One backbone layer. Fields: arguments of `ops.decoder_block`; absent biases and norms are None."""

    input_layernorm: Tensor
    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    o_proj: Tensor
    post_attention_layernorm: Tensor
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass
class ExitLayerWeights:
    """Packed W4 matrices (uint8, see w4.py) of one exit layer; norms and biases are the backbone's."""

    qkv_proj: Tensor
    o_proj: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor


@dataclass
class ModelWeights:
    """The backbone: embedding, decoder blocks, final norm and head. A tied lm_head is embed_tokens itself."""

    embed_tokens: Tensor  # [vocab_size, hidden_size]
    layers: list[DecoderBlockWeights]
    norm: Tensor  # [hidden_size]
    lm_head: Tensor  # [vocab_size, hidden_size]
