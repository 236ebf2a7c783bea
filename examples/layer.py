"""A whole layer twice: as the backbone has it, and as its 4-bit exit layer, on one KV cache."""

import torch

import river_ext
from river_ext import ops
from river_ext.quant import w4

hidden_size, heads, kv_heads, head_dim, max_len = 512, 8, 2, 64, 128
shape = w4.BlockShape(
    hidden_size=hidden_size,
    num_attention_heads=heads,
    num_key_value_heads=kv_heads,
    head_dim=head_dim,
    rotary_dim=head_dim,
    intermediate_size=1024,
)
dense = {name: (torch.randn(size) * size[1] ** -0.5).bfloat16() for name, size in shape.projections().items()}
norm = torch.ones(hidden_size, dtype=torch.bfloat16)
norms = {"input_layernorm": norm, "post_attention_layernorm": norm, "rms_norm_eps": 1e-5}

k_cache, v_cache = torch.zeros(2, 1, kv_heads, max_len, head_dim, dtype=torch.bfloat16)
slots, positions = torch.tensor([[0], [0]], dtype=torch.int32)  # one row: position 0 of sequence 0
cos, sin = river_ext.rotary_tables(head_dim, max_len)
attention = {
    "k_cache": k_cache,
    "v_cache": v_cache,
    "slots": slots,
    "positions": positions,
    "cos": cos,
    "sin": sin,
    "num_attention_heads": heads,
}

x = torch.randn(1, hidden_size, dtype=torch.bfloat16)
full, similarity = ops.decoder_block(x, **dense, **norms, **attention)

exit_layer = w4.pack_exit_layer({name: river_ext.quantize(w) for name, w in dense.items()}, shape)
small, _ = ops.exit_layer(
    x,
    qkv_proj=exit_layer.qkv_proj,
    o_proj=exit_layer.o_proj,
    gate_up_proj=exit_layer.gate_up_proj,
    down_proj=exit_layer.down_proj,
    **norms,
    **attention,
)

error = ((small - full).norm() / full.norm()).item()
print(f"similarity of input and output {similarity.item():.3f}, relative error of the exit layer {error:.3f}")
