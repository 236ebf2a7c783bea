"""Attention of three rows, each the newest token of its own sequence, against one KV cache."""

import torch

from river_ext import ops

slots, kv_heads, heads, head_dim, max_len = 4, 2, 8, 64, 512
k_cache = torch.randn(slots, kv_heads, max_len, head_dim, dtype=torch.bfloat16)
v_cache = torch.randn(slots, kv_heads, max_len, head_dim, dtype=torch.bfloat16)

query = torch.randn(3, heads, head_dim, dtype=torch.bfloat16)  # already rotated
slot = torch.tensor([2, 0, 3], dtype=torch.int32)  # which sequence a row belongs to
position = torch.tensor([511, 40, 7], dtype=torch.int32)  # it sees positions 0 to its own
out = ops.decode_attention(query, k_cache, v_cache, slot, position)

k, v = (cache[2, :, :512].repeat_interleave(heads // kv_heads, dim=0) for cache in (k_cache, v_cache))
expected = torch.nn.functional.scaled_dot_product_attention(query[0, :, None], k, v)[:, 0]
print(f"{tuple(out.shape)}, largest difference to torch's {(out[0] - expected).abs().max().item():.1e}")
