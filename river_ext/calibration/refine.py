"""Refines exit layers with what they will see: `(W - Wq) X` becomes small rather than `W - Wq`.

All texts go through the backbone and, beside it, through the exit layers that are refined already, from depth 0
on: what exit layers get when the river drafts, and close to what they get after an exit. A projection W has
inputs x on the first way and z on the second; the sums over all tokens

    H = sum z z^T       C = sum (x - z) z^T

are all that is needed: W + W C H^-1 is the weight that makes of z the best of what W makes of x, so that it
undoes some of what the layers before it have changed, and H is what GPTQ's error feedback goes by when that
weight is quantised (quant/gptq.py). o_proj and down_proj add to the hidden state, and so can undo some of what
it has drifted by, from h on the first way to g on the second: to W C comes D = sum (h - g) z^T.

Memory: hidden states and attention's outputs of all texts on both ways (tokens x 4 x hidden_size in the model
dtype), one layer's weights in fp32, and for one projection H, C, D and the factors of H: about
5 in_features^2 + 3 in_features out_features in fp32.
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
        config, block = self.network.config, self.network.layers[index].block
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
        river.fit(("o_proj",), attended, self.hidden)
        advance()
        middle = [
            tuple(add(h, linear(x, way.o(), block.o_bias)) for way, h, x in zip(ways, *pairs, strict=True))
            for pairs in zip(self.hidden, attended, strict=True)
        ]
        del attended
        river.fit(GATE_UP, normed(middle, block.post_attention_layernorm))
        advance()
        swiglus = (
            tuple(self._rows(index, way, len(h)).swiglu(h) for way, h in zip(ways, pair, strict=True))
            for pair in middle
        )
        river.fit(("down_proj",), swiglus, middle)
        exit_layer = pack_exit_layer(river.quantised, BlockShape.of(config))
        self.follow(index, exit_layer)
        advance()
        return exit_layer

    def follow(self, index: int, exit_layer: ExitLayerWeights) -> None:
        """Takes all texts through the next layer, on both ways."""
        shape = BlockShape.of(self.network.config)
        river = river_matrices(exit_layer, shape)
        river = Matrices(**{name: cache(make) for name, make in vars(river).items()})  # not for every text
        ways = backbone_matrices(self.network.layers[index].block), river
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

    def fit(self, names: tuple[str, ...], inputs: Iterable[Pair], hidden: Sequence[Pair] = ()) -> None:
        """Quantises projections that have the same inputs.

        Args:
            inputs: [tokens, in_features] of every text.
            hidden: [tokens, out_features] of every text, the states that the outputs are added to.
        """
        name = f"{self.name}.{'+'.join(names)}"
        weights = [getattr(self.block, projection).float() for projection in names]
        weight, rows = torch.cat(weights), [len(part) for part in weights]
        hessian, correction = _sums(weight, inputs, hidden)
        if not (hessian.isfinite().all() and correction.isfinite().all()):
            raise RiverError(f"{name}: activations with NaN or Inf in {self.block.o_proj.dtype}")
        factor = gptq.damped_factor(hessian, name)
        weight += torch.cholesky_solve(correction.T, factor).T
        quantised = hqq.quantize(weight, self.group_size, hessian=hessian, name=name)
        split = zip(*(part.split(rows) for part in quantised), strict=True)
        for projection, (q, scale, zero) in zip(names, split, strict=True):
            self.quantised[projection] = q, scale, zero
            scale, zero = (
                part.float().repeat_interleave(self.group_size, 1)[:, : q.shape[1]] for part in (scale, zero)
            )
            self.dense[projection] = (q.float() - zero) * scale


def _sums(weight: Tensor, inputs: Iterable[Pair], hidden: Sequence[Pair]) -> Pair:
    """H and W C + D of the module's text, over the tokens of all texts."""
    rows, columns = weight.shape
    hessian, cross = weight.new_zeros(2, columns, columns)
    drift = weight.new_zeros(rows, columns)
    for text, (x, z) in enumerate(inputs):
        z = z.float()
        hessian.addmm_(z.T, z)
        cross.addmm_((x.float() - z).T, z)
        if hidden:
            h, g = hidden[text]
            drift.addmm_((h.float() - g.float()).T, z)
    return hessian, drift.addmm_(weight, cross)
