"""The paper's other KV strategies, which its river is compared with. The rest can be read without them.

A token that exits has no K and V in the remaining layers. The river ("share") has its exit layers write them.
Here no exit layer runs: the token goes from its last backbone layer straight to the final norm and the head,
and what later tokens find in the layers that it left out is

    mask        nothing, and they do not look there
    recompute   what the backbone makes of the token, as soon as one of them comes to that layer
    propagate   K and V of the hidden state with which it exited
    monotone    never asked for: no token of a sequence runs deeper than the one before

A step is a loop over the layers, whose exits the host decides. On a GPU its end alone is a graph.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import ops
from .decoder import Decoder
from .exit_rule import ExitRule, still_staying
from .graph import tail_part
from .matmul import rms_norm, rotate
from .network import Layer
from .step import Row, RowOutput, Work


class BackboneDecoder(Decoder):
    """Steps of the backbone, which each row leaves for the head. Rows are named by their index in the runner.

    The batch policy is the engine's: rows exit on their own, or those of one strategy together.
    """

    @torch.inference_mode()
    def step(self, run_ahead: bool = True) -> list[RowOutput]:
        runner = self.runner
        with self.memory.on_stream():
            depths, similarities = self._run_backbone()
        graph = runner.replay(tail_part, runner.layers, self.filters, self.logits, False)
        self.taken += 1
        _, tokens, _ = runner.record(self.taken)
        return self._outputs(depths, tokens, similarities, graph)

    def _run_backbone(self) -> tuple[dict[int, int], list[list[float]]]:
        """Exit depths by row, similarities by row and layer; what the rows exit with is in runner.between."""
        runner, rules = self.runner, self.rules()
        hidden, similarities, depths, staying = runner.hidden, [], {}, list(self.rows)
        runner.route(staying, leaving=[])
        for layer in runner.network.layers:
            runner.network.fetch(layer.index, layer.index + 1)
            hidden, similarity = self.run(layer, hidden, staying)  # other rows are copied through
            similarities.append(similarity.tolist())
            depth = layer.index + 1
            stays = still_staying(
                [rules[row] for row in staying],
                depth,
                [True] * len(staying),
                [similarities[-1][row] for row in staying],
                self.together,
            )
            if all(stays):
                continue
            exits = [row for row, stay in zip(staying, stays, strict=True) if not stay]
            depths.update(dict.fromkeys(exits, depth))
            if depth < runner.layers:
                self.exit(exits, depth, hidden)
            staying = [row for row in staying if row not in depths]
            if not staying:
                break
            runner.route(staying, leaving=[])
        runner.between.copy_(hidden)
        return depths, [list(row) for row in zip(*similarities, strict=True)]

    def position(self, row: int) -> int:
        """Of its token in this step."""
        return self.rows[row].position + self.taken

    def rules(self) -> Mapping[int, ExitRule]:
        return {index: row.request.rule for index, row in self.rows.items()}

    def run(self, layer: Layer, hidden: Tensor, staying: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Rows that stay through the decoder block: hidden [rows, hidden_size] and similarity [rows]."""
        return layer.block(hidden, self.runner.on_backbone)

    def exit(self, rows: Sequence[int], depth: int, hidden: Tensor) -> None:
        """What becomes of the remaining layers of rows that exit with these of the hidden states."""

    def work(self, row: int, depth: int) -> Work:
        return Work(backbone_rows=depth)


class MaskDecoder(BackboneDecoder):
    """What is missing is masked, layer by layer."""

    @torch.inference_mode()
    def start(self, rows: Sequence[Row]) -> None:
        super().start(rows)
        with self.memory.on_stream():
            layers, slots, _, max_len, _ = self.memory.cache.k.shape
            device = self.memory.network.device
            self.kv_valid = torch.ones(layers, slots, max_len, dtype=torch.bool, device=device)
            index = torch.arange(layers, device=device)[:, None]
            for row in rows:
                depths = torch.tensor(row.exits.depths[1:], device=device)
                decoded = slice(row.position - len(depths), row.position)
                self.kv_valid[:, row.slot, decoded] = index < depths

    def run(self, layer: Layer, hidden: Tensor, staying: Sequence[int]) -> tuple[Tensor, Tensor]:
        return layer.block(hidden, self.runner.on_backbone._replace(kv_valid=self.kv_valid[layer.index]))

    def exit(self, rows: Sequence[int], depth: int, hidden: Tensor) -> None:
        for row in rows:
            self.kv_valid[depth:, self.rows[row].slot, self.position(row)] = False


class RecomputeDecoder(BackboneDecoder):
    """Tokens that exited go on from where they are, beside the first later one that needs them there."""

    def step(self, run_ahead: bool = True) -> list[RowOutput]:
        self.recomputed = Counter()  # by row
        return super().step(run_ahead)

    def run(self, layer: Layer, hidden: Tensor, staying: Sequence[int]) -> tuple[Tensor, Tensor]:
        late = self._missing(layer, staying)
        if not late:
            return super().run(layer, hidden, staying)
        states = [self.rows[row].exits.unfinished[position][1] for position, row in late]
        hidden = torch.cat([torch.stack(states), hidden])
        place = self.runner.on_backbone
        slots = place.slots.new_tensor([self.rows[row].slot for _, row in late])
        positions = place.positions.new_tensor([position for position, _ in late])
        slots, positions = torch.cat([slots, place.slots]), torch.cat([positions, place.positions])
        passes = zip(*(rows.split(ops.MAX_ROWS) for rows in (hidden, slots, positions)), strict=True)
        outputs = [layer.block(h, place._replace(slots=s, positions=p)) for h, s, p in passes]
        hidden, similarity = map(torch.cat, zip(*outputs, strict=True))
        for (position, row), state in zip(late, hidden[: len(late)], strict=True):
            self._keep(row, position, layer.index + 1, state)
            self.recomputed[row] += 1
        return hidden[len(late) :], similarity[len(late) :]

    def _missing(self, layer: Layer, staying: Sequence[int]) -> list[tuple[int, int]]:
        """(position, row) of earlier tokens that have not been in the layer, oldest first."""
        return sorted(
            (position, row)
            for row in staying
            for position, (depth, _) in self.rows[row].exits.unfinished.items()
            if depth == layer.index and position < self.position(row)
        )

    def _keep(self, row: int, position: int, depth: int, hidden: Tensor) -> None:
        """A token has run `depth` layers."""
        unfinished = self.rows[row].exits.unfinished
        if depth < self.runner.layers:
            unfinished[position] = depth, hidden.clone()  # a view would keep the rows beside it
        else:
            del unfinished[position]

    def exit(self, rows: Sequence[int], depth: int, hidden: Tensor) -> None:
        for row in rows:
            self._keep(row, self.position(row), depth, hidden[row])

    def work(self, row: int, depth: int) -> Work:
        recomputed = self.recomputed[row]
        return Work(backbone_rows=depth + recomputed, recomputed_rows=recomputed)


class PropagateDecoder(BackboneDecoder):
    """Each layer that is left out gets its K and V by its own norm and projections."""

    def exit(self, rows: Sequence[int], depth: int, hidden: Tensor) -> None:
        network, cache = self.memory.network, self.memory.cache
        slots = torch.tensor([self.rows[row].slot for row in rows], device=hidden.device)
        positions = torch.tensor([self.position(row) for row in rows], device=hidden.device)
        layers = network.layers[depth:]
        k, v = self._projected(layers, hidden[rows])
        tables = [layer.tables(self.memory.rope) for layer in layers]
        cos, sin = (torch.cat([table[name][positions] for table in tables]) for name in ("cos", "sin"))
        k = rotate(k.flatten(0, 1), cos, sin).view_as(k)
        for written, values in ((cache.k, k), (cache.v, v)):
            written[depth:, slots, :, positions] = values.transpose(0, 1).to(written.dtype)

    def _projected(self, layers: Sequence[Layer], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """K, before its rotation, and V: [layers, rows, num_key_value_heads, head_dim].

        Beside the roundings of a decoder block, K is rounded before its norm and rotation, too.
        """
        network = self.memory.network
        config, weights = network.config, [layer.weights for layer in layers]
        norms = torch.stack([one.input_layernorm for one in weights])
        inputs, k, v = rms_norm(hidden, norms[:, None], config.rms_norm_eps), [], []
        for layer, x in zip(layers, inputs, strict=True):
            network.fetch(layer.index, config.num_hidden_layers)
            k.append(ops.linear(x, layer.weights.k_proj, layer.weights.k_bias))
            v.append(ops.linear(x, layer.weights.v_proj, layer.weights.v_bias))
        heads = config.num_key_value_heads, config.head_dim
        k, v = (torch.stack(outputs).float().unflatten(-1, heads) for outputs in (k, v))
        if weights[0].k_norm is not None:
            norms = torch.stack([one.k_norm for one in weights])
            k = rms_norm(k, norms[:, None, None], config.rms_norm_eps)
        return k, v

    def work(self, row: int, depth: int) -> Work:
        return Work(backbone_rows=depth, projected_rows=self.runner.layers - depth)


class MonotoneDecoder(BackboneDecoder):
    """A row must exit where the token before it did; of rows that exit together, where one of them must."""

    def rules(self) -> Mapping[int, ExitRule]:
        limits = {
            index: min(row.request.rule.limit, row.exits.depths[-1]) for index, row in self.rows.items()
        }
        if self.together:
            limits = dict.fromkeys(limits, min(limits.values()))
        return {index: replace(rule, limit=limits[index]) for index, rule in super().rules().items()}


KV_DECODERS = {
    "mask": MaskDecoder,
    "recompute": RecomputeDecoder,
    "propagate": PropagateDecoder,
    "monotone": MonotoneDecoder,
}  # by kv_strategy
