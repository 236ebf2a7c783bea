"""The weights of a model: their shapes, and plain tensors grouped the way the ops take them."""

from dataclasses import dataclass

from torch import Tensor

from ..ops import TILE_COLS, TILE_ROWS, packed_shape


@dataclass(frozen=True)
class BlockShape:
    """The dimensions of a decoder block, by their names in Hugging Face configs, and all its shapes."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    intermediate_size: int

    @classmethod
    def of(cls, config) -> "BlockShape":
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every field of `DecoderBlockWeights`; a model may lack biases, and q and k norms."""
        hidden, inner, head_dim = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_attention_heads * head_dim, self.num_key_value_heads * head_dim
        return {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "q_proj": (q, hidden),
            "q_bias": (q,),
            "k_proj": (kv, hidden),
            "k_bias": (kv,),
            "v_proj": (kv, hidden),
            "v_bias": (kv,),
            "o_proj": (hidden, q),
            "o_bias": (hidden,),
            "q_norm": (head_dim,),
            "k_norm": (head_dim,),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }

    def projections(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of each projection of a block, as in a checkpoint."""
        return {name: shape for name, shape in self.tensors().items() if len(shape) == 2}

    def packed(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of each packed weight of an exit layer, padding included: w4.py has the orders."""
        sizes = self.projections()
        q, k, v = (_round_up(sizes[name][0], TILE_ROWS) for name in ("q_proj", "k_proj", "v_proj"))
        hidden, attended, inner = (
            _round_up(sizes[name][1], TILE_COLS) for name in ("q_proj", "o_proj", "down_proj")
        )
        return {
            "qkv_proj": (q + k + v, hidden),
            "o_proj": (_round_up(self.hidden_size, TILE_ROWS), attended),
            "gate_up_proj": (2 * _round_up(self.intermediate_size, TILE_ROWS // 2), hidden),
            "down_proj": (_round_up(self.hidden_size, TILE_ROWS), inner),
        }

    def padding(self) -> dict[str, tuple[int, int]]:
        """How many (rows, columns) of each packed weight of an exit layer are padding."""
        sizes = self.projections()
        sizes["qkv_proj"] = (sizes["q_proj"][0] + 2 * sizes["k_proj"][0], self.hidden_size)
        sizes["gate_up_proj"] = (2 * self.intermediate_size, self.hidden_size)
        packed = self.packed().items()
        return {name: (rows - sizes[name][0], columns - sizes[name][1]) for name, (rows, columns) in packed}

    def tiles(self) -> dict[str, tuple[int, int, int]]:
        """Shape of every field of `ExitLayerWeights`."""
        return {name: packed_shape(*size) for name, size in self.packed().items()}


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


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
