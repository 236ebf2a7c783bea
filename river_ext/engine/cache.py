"""The KV cache: one place per (layer, slot, position), filled by whichever path runs the layer."""

import torch
from torch import Tensor

from ..errors import memory_for


class KVCache:
    """K and V of all layers, each [layers, slots, num_key_value_heads, max_len, head_dim] in the model dtype.

    The contents start undefined: a position is read only after the step that wrote it. Backbone and exit
    layers write to the same places, so after a step every layer holds its position.
    """

    def __init__(self, config, slots: int, max_len: int, dtype: torch.dtype, device="cpu"):
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, max_len, config.head_dim)
        with memory_for(f"a KV cache of {slots} x {max_len} positions"):
            self.k = torch.empty(shape, dtype=dtype, device=device)
            self.v = torch.empty(shape, dtype=dtype, device=device)
        self._layers = list(zip(self.k.unbind(), self.v.unbind(), strict=True))

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(k, v) of one layer, views of [slots, num_key_value_heads, max_len, head_dim]."""
        return self._layers[index]

    @torch.inference_mode()  # which the tensors may be of
    def copy(self, source: int, target: int, count: int) -> None:
        """Positions 0..count-1 of one slot to another, in all layers."""
        for values in (self.k, self.v):
            values[:, target, :, :count] = values[:, source, :, :count]

    @property
    def slots(self) -> int:
        return self.k.shape[1]

    @property
    def max_len(self) -> int:
        return self.k.shape[3]
