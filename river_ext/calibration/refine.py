"""Refines exit layers with what they will see: `(W - Wq) X` becomes small rather than `W - Wq`.

All texts go through the backbone and, beside it, through the exit layers that are refined already, from depth
0 on: what exit layers get when the river drafts, and close to what they get after an exit. A projection W has
inputs x on the first way and z on the second. The sums over all tokens

    H = sum z z^T       C = sum (x - z) z^T

are all that is needed: W + W C H^-1 is the weight that makes of z the best of what W makes of x, so that it
undoes some of what the layers before it have changed, and H is what GPTQ's error feedback goes by when that
weight is quantised (quant/gptq.py).

Memory: hidden states and attention's outputs of all texts on both ways (tokens x 4 x hidden_size in the model
dtype), one layer's weights in fp32, and for one projection H, C and H's factors (5 in_features^2 in fp32).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch
from torch import Tensor

from ..engine.matmul import ManyRows, Matrices, add, backbone_matrices, linear, river_matrices, rms_norm
from ..engine.network import Network
from ..errors import RiverError
from ..loading.weights import BlockShape, DecoderBlockWeights, ExitLayerWeights
from ..quant import gptq, hqq
from ..quant.w4 import Quantised, pack_exit_layer

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")

DAMPING = 0.1  # of H in H^-1, against overfitting: 0.01 is better where there are many tokens, by little

Pair = tuple[Tensor, Tensor]  # rows of one text: through the backbone, through the river


class Refinement:
    """Takes the layers in turn: each by `refine`, or by `follow` where its exit layer is there already."""

    def __init__(self, network: Network, texts: Sequence[Sequence[int]], group_size: int):
        """texts are token ids, at least one each."""
        self.network, self.group_size = network, group_size
        embedded = [network.embed(torch.tensor(tokens, device=network.device)) for tokens in texts]
        self.hidden: list[Pair] = [(rows, rows) for rows in embedded]  # what the next layer gets

    def refine(self, index: int, advance: Callable[[], None] = lambda: None) -> ExitLayerWeights:
        """The exit layer of the next layer; calls `advance` after each of four steps."""
        config, block = self.network.config, self.network.layers[index].weights
        river = _ExitLayer(block, self.group_size, f"layers.{index}")
        ways = backbone_matrices(block), river.matrices()

        def normed(hidden: Iterable[Pair], weight: Tensor) -> Iterable[Pair]:
            return (tuple(rms_norm(rows, weight, config.rms_norm_eps) for rows in pair) for pair in hidden)

        river.fit(QKV, normed(self.hidden, block.input_layernorm))
        advance()
        attended = [
            tuple(self._rows(index, way, len(h)).attended(0, h) for way, h in zip(ways, pair, strict=True))
            for pair in self.hidden
        ]
        river.fit(("o_proj",), attended)
        advance()
        middle = [
            tuple(
                add(h, linear(x, way.o(), block.o_bias), config.residual_multiplier)
                for way, h, x in zip(ways, *pairs, strict=True)
            )
            for pairs in zip(self.hidden, attended, strict=True)
        ]
        del attended
        river.fit(GATE_UP, normed(middle, block.post_attention_layernorm))
        advance()
        swiglus = (
            tuple(self._rows(index, way, len(h)).swiglu(h) for way, h in zip(ways, pair, strict=True))
            for pair in middle
        )
        river.fit(("down_proj",), swiglus)
        exit_layer = pack_exit_layer(river.quantised, BlockShape.of(config))
        self.follow(index, exit_layer)
        advance()
        return exit_layer

    def follow(self, index: int, exit_layer: ExitLayerWeights) -> None:
        """Takes all texts through the next layer, on both ways."""
        shape = BlockShape.of(self.network.config)
        river = river_matrices(exit_layer, shape)
        river = Matrices(**{name: cache(make) for name, make in vars(river).items()})  # not for every text
        ways = backbone_matrices(self.network.layers[index].weights), river
        for text, pair in enumerate(self.hidden):
            self.hidden[text] = tuple(
                self._rows(index, way, len(h)).run(0, h) for way, h in zip(ways, pair, strict=True)
            )

    def _rows(self, index: int, matrices: Matrices, length: int) -> ManyRows:
        """A layer for the rows of one text, which begin at position 0."""
        network, config = self.network, self.network.config
        shape = (2, config.num_key_value_heads, length, config.head_dim)
        k, v = torch.empty(shape, dtype=network.dtype, device=network.device)
        rope = network.prompt_rope(length, length)
        return ManyRows(config=config, layer=network.layers[index], matrices=matrices, rope=rope, k=k, v=v)


class _ExitLayer:
    """An exit layer in the making."""

    def __init__(self, block: DecoderBlockWeights, group_size: int, name: str):
        self.block, self.group_size, self.name = block, group_size, name
        self.quantised: dict[str, Quantised] = {}
        self.dense: dict[str, Tensor] = {}  # the same in fp32

    def matrices(self) -> Matrices:
        dense = self.dense
        return Matrices(
            qkv=lambda: tuple(dense[name] for name in QKV),
            o=lambda: dense["o_proj"],
            gate_up=lambda: tuple(dense[name] for name in GATE_UP),
            down=lambda: dense["down_proj"],
        )

    def fit(self, names: tuple[str, ...], inputs: Iterable[Pair]) -> None:
        """Quantises projections that have the same inputs, [tokens, in_features] of every text."""
        name = f"{self.name}.{'+'.join(names)}"
        weights = [getattr(self.block, projection).float() for projection in names]
        weight, rows = torch.cat(weights), [len(part) for part in weights]
        hessian, cross = _sums(inputs, weight.new_zeros(2, weight.shape[1], weight.shape[1]))
        if not (hessian.isfinite().all() and cross.isfinite().all()):
            raise RiverError(f"{name}: activations with NaN or Inf in {self.block.o_proj.dtype}")
        factor = gptq.damped_factor(hessian, name, DAMPING)
        weight += weight @ torch.cholesky_solve(cross.T, factor).T
        quantised = hqq.quantize(weight, self.group_size, hessian=hessian, name=name)
        split = zip(*(part.split(rows) for part in quantised), strict=True)
        for projection, (q, scale, zero) in zip(names, split, strict=True):
            self.quantised[projection] = q, scale, zero
            scale, zero = (
                part.float().repeat_interleave(self.group_size, 1)[:, : q.shape[1]] for part in (scale, zero)
            )
            self.dense[projection] = (q.float() - zero) * scale


def _sums(inputs: Iterable[Pair], sums: Tensor) -> Tensor:
    """H and C of the module's text, added to zeros."""
    hessian, cross = sums
    for x, z in inputs:
        z = z.float()
        hessian.addmm_(z.T, z)
        cross.addmm_((x.float() - z).T, z)
    return sums
