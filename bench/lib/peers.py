"""What the benchmarks compare with: a step in plain torch, on cuBLAS, and Llama of transformers."""

import torch
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from river_ext.engine.cache import KVCache
from river_ext.engine.network import Network
from river_ext.loading.checkpoint import tensor_name
from river_ext.loading.config import ModelConfig
from river_ext.loading.weights import ModelWeights


def fill_cache(cache: KVCache) -> None:
    """Random, as a cache of zeros could be faster than real ones."""
    for tensor in (*cache.k, *cache.v):
        tensor.normal_()


class TorchStep:
    """One token for every row in plain torch: fused projections, a static cache, no exits. Greedy."""

    def __init__(self, network: Network, rows: int, context: int):
        config, device = network.config, network.device
        self.network, self.context = network, context
        self.shape = (rows, -1, 1, config.head_dim)
        blocks = [layer.weights for layer in network.layers]
        self.qkv = [torch.cat([b.q_proj, b.k_proj, b.v_proj]) for b in blocks]
        self.gate_up = [torch.cat([b.gate_proj, b.up_proj]) for b in blocks]
        self.cache = KVCache(config, rows, context + 1, network.dtype, device)
        fill_cache(self.cache)
        self.position = torch.tensor([context], device=device)
        cos, sin = (table[context].to(network.dtype) for table in network.rope(context + 1)[:2])
        self.cos, self.sin = torch.cat([cos, cos]), torch.cat([sin, sin])
        self.tokens = torch.randint(0, config.vocab_size, (rows,), device=device)
        kv = config.num_key_value_heads * config.head_dim
        self.sizes = [config.num_attention_heads * config.head_dim, kv, kv]

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-second, first], dim=-1) * self.sin

    def layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        block, eps = self.network.layers[index].weights, self.network.config.rms_norm_eps
        k_cache, v_cache = self.cache.layer(index)
        x = rms_norm(hidden, hidden.shape[1:], block.input_layernorm, eps)
        q, k, v = (part.view(self.shape) for part in linear(x, self.qkv[index]).split(self.sizes, dim=1))
        k_cache.index_copy_(2, self.position, self.rotate(k))
        v_cache.index_copy_(2, self.position, v)
        attended = scaled_dot_product_attention(self.rotate(q), k_cache, v_cache, enable_gqa=True)
        hidden = hidden + linear(attended.flatten(1), block.o_proj)
        x = rms_norm(hidden, hidden.shape[1:], block.post_attention_layernorm, eps)
        gate, up = linear(x, self.gate_up[index]).chunk(2, dim=1)
        return hidden + linear(silu(gate) * up, block.down_proj)

    @torch.inference_mode()
    def __call__(self) -> None:
        network = self.network
        hidden = embedding(self.tokens, network.embed_tokens)
        for index in range(len(network.layers)):
            hidden = self.layer(index, hidden)
        x = rms_norm(hidden, hidden.shape[1:], network.norm, network.config.rms_norm_eps)
        self.tokens.copy_(linear(x, network.lm_head).argmax(dim=1))


def llama_config(config: ModelConfig):
    """The shape as transformers has it."""
    from transformers import LlamaConfig

    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim rms_norm_eps max_position_embeddings tie_word_embeddings"
    )
    return LlamaConfig(**{name: getattr(config, name) for name in names.split()})


def llama_around(config: ModelConfig, weights: ModelWeights):
    """Llama of transformers around the same tensors."""
    from transformers import LlamaForCausalLM  # takes seconds, and only this needs it

    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(config))
    state = {"model.embed_tokens.weight": weights.embed_tokens, "model.norm.weight": weights.norm}
    state["lm_head.weight"] = weights.lm_head
    for index, layer in enumerate(weights.layers):
        for field, tensor in vars(layer).items():
            if tensor is not None:
                state[tensor_name(index, field)] = tensor
    model.load_state_dict(state, assign=True)
    rotary = type(model.model.rotary_emb)(model.config)  # its buffers are not in a state dict
    model.model.rotary_emb = rotary
    return model.eval()
