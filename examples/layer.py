"""A whole layer twice: as the backbone has it, and as its 4-bit exit layer, on one KV cache."""

import torch

import river_ext
from river_ext import ops
from river_ext.quant import w4

hidden_size, heads, kv_heads, head_dim, inner, max_len = 512, 8, 2, 64, 1024, 128
shape = w4.BlockShape(hidden_size, heads, kv_heads, head_dim, head_dim, inner)
dense = {name: (torch.randn(size) * size[1] ** -0.5).bfloat16() for name, size in shape.projections().items()}
attention = [dense[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
mlp = [dense[name] for name in ("gate_proj", "up_proj", "down_proj")]
norm = torch.ones(hidden_size, dtype=torch.bfloat16)

k_cache, v_cache = torch.zeros(2, 1, kv_heads, max_len, head_dim, dtype=torch.bfloat16)
slots, positions = torch.tensor([[0], [0]], dtype=torch.int32)  # one row: position 0 of sequence 0
place = (k_cache, v_cache, slots, positions, *river_ext.rotary_tables(head_dim, max_len), heads, 1e-5)

x = torch.randn(1, hidden_size, dtype=torch.bfloat16)
full, similarity = ops.decoder_block(x, norm, *attention, norm, *mlp, *place)

exit_layer = w4.pack_exit_layer({name: river_ext.quantize(w) for name, w in dense.items()}, shape)
matrices = (exit_layer.qkv_proj, exit_layer.o_proj, norm, exit_layer.gate_up_proj, exit_layer.down_proj)
small, _ = ops.exit_layer(x, norm, *matrices, *place)

error = ((small - full).norm() / full.norm()).item()
print(f"similarity of input and output {similarity.item():.3f}, relative error of the exit layer {error:.3f}")
