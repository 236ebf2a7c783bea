"""A language model's head as `lm_head` takes it, or `lm_head_w4`, so that one test is of both."""

import torch

from river_ext import ops, reference
from river_ext.quant.hqq import quantize

KINDS = ["lm_head", "lm_head_w4"]
SCALES = 512  # where a tile's scales and zeros begin


class Head:
    """A weight [vocab_size, hidden_size] as the op `kind` takes it; padding of the last strip is poisoned."""

    def __init__(self, kind, weight):
        self.kind, (self.vocab_size, self.hidden_size) = kind, weight.shape
        self.weight, self.arguments = weight.clone(), ()
        if kind == "lm_head_w4":
            self.weight = ops.pack_w4(*quantize(weight))
            self.arguments = (self.vocab_size,)
            for token in range(self.vocab_size, 16 * len(self.weight)):
                self.spoil(token, float("nan") if token % 2 else 60000.0)

    def spoil(self, token, value):
        """Puts a value into an output row: its last weight, or its scales."""
        if self.kind == "lm_head":
            self.weight[token, -1] = value
        else:
            at = SCALES + 4 * (token % 16)
            scale = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
            self.weight[token // 16, :, at : at + 2] = scale

    def __call__(self, hidden, norm, module=ops, **options):
        """(tokens, logits) by the op of a module: ops, or one that stands for a GPU."""
        op = getattr(module, self.kind)
        return op(hidden, norm, self.weight, *self.arguments, 1e-5, **options)

    def reference(self, hidden, norm, **options):
        return self(hidden, norm, reference, **options)
