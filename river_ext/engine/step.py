"""One decoding step, run eagerly, op by op: up to eight rows through backbone, river and head.

    embed -> decoder blocks 0..d-1, a decision after each -> exit layers d..L-1 -> norm, head, token

The decision is one small read per layer, and only where the rule can be met at all; nothing else of a step
comes back to the host before its end. graph.py has the same steps as captured graphs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from ..errors import RiverError
from .cache import KVCache
from .exit_rule import ExitRule
from .network import Network
from .sampling import Sampling, next_tokens


@dataclass(frozen=True)
class Rows:
    """The tokens in flight, one row each; a row with slot -1 is inactive."""

    tokens: Tensor  # int64 [T], the token that goes in
    slots: Tensor  # int32 [T]
    positions: Tensor  # int32 [T], of that token in its sequence
    seeds: Tensor  # int64 [T], of the row's request
    rule: ExitRule

    @classmethod
    def of(
        cls,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        seeds: Sequence[int],
        rule: ExitRule,
        cache: KVCache,
    ) -> "Rows":
        """Rows from host values, checked here because an op on a GPU could not without waiting for it."""
        places = [place for place in zip(slots, positions, strict=True) if place[0] >= 0]
        if not 1 <= len(slots) <= ops.MAX_ROWS:
            raise RiverError(f"{len(slots)} rows; accepted: 1 to {ops.MAX_ROWS}")
        if len(set(places)) < len(places):
            raise RiverError("two rows have the same slot and position")
        for slot, position in places:
            if slot >= cache.slots or not 0 <= position < cache.max_len:
                raise RiverError(
                    f"slot {slot}, position {position} is outside the cache of {cache.slots} slots "
                    f"x {cache.max_len} positions"
                )
        device = cache.k.device
        return cls(
            torch.tensor(tokens, dtype=torch.int64, device=device),
            torch.tensor(slots, dtype=torch.int32, device=device),
            torch.tensor(positions, dtype=torch.int32, device=device),
            torch.tensor(seeds, dtype=torch.int64, device=device),
            replace(rule, active=tuple(slot >= 0 for slot in slots)),
        )

    def advance(self, tokens: Tensor) -> "Rows":
        """The same sequences one position later."""
        return replace(self, tokens=tokens, positions=self.positions + 1)

    def keep(self, rows: Sequence[int]) -> "Rows":
        """Some of the rows: batch invariance makes dropping a row as good as masking it."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.tokens.device)
        tensors = (t[index] for t in (self.tokens, self.slots, self.positions, self.seeds))
        return Rows(*tensors, self.rule.keep(rows))


@dataclass(frozen=True)
class StepOutput:
    """What a step, or a prefill, gives for each of its rows."""

    tokens: Tensor  # int64 [T], the new tokens; negative where a row has none, see not_finite
    logits: Tensor | None  # fp32 [T, vocab_size], if asked for
    exit_depths: list[int]
    similarities: list[list[float]]  # by row: one per backbone layer that it ran


WIDER = {
    torch.float16: "load the model with dtype='bfloat16', or 'float32' on the CPU",
    torch.bfloat16: "load the model with dtype='float32' on the CPU, or look at the checkpoint's weights",
    torch.float32: "no dtype is wider, look at the checkpoint's weights",
}


def not_finite(dtype: torch.dtype, position: int, similarities: Sequence[float]) -> str:
    """Why a row has no token at a position, and what helps: a logit was NaN or infinite.

    Only a vector that is zero or not finite has a similarity of exactly 0, so the first one tells the layer.
    """
    layer = next((index for index, similarity in enumerate(similarities) if similarity == 0), None)
    where = "" if layer is None else f", and so are the hidden states from layer {layer} on"
    name = str(dtype).removeprefix("torch.")
    return f"no token at position {position}: its logits are NaN or infinite in {name}{where}; {WIDER[dtype]}"


@torch.inference_mode()
def decode_step(
    network: Network, cache: KVCache, rows: Rows, sampling: Sampling, return_logits: bool = False
) -> StepOutput:
    """Runs the rows through the network and writes their K and V, once per layer."""
    hidden = network.embed(rows.tokens)
    hidden, similarities = run_backbone(network, cache, rows, hidden)
    depth = len(similarities)
    hidden = run_river(network, cache, rows, hidden, first=depth)
    tokens, logits = next_tokens(
        network, hidden, sampling, rows.seeds, rows.positions + 1, return_logits=return_logits
    )
    by_row = torch.stack(similarities, dim=1).tolist() if depth else [[] for _ in rows.rule.active]
    return StepOutput(tokens, logits, [depth] * len(by_row), by_row)


def run_backbone(network: Network, cache: KVCache, rows: Rows, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Decoder blocks until the rule lets the rows exit: hidden, and the similarities at each layer run."""
    rope, similarities = network.rope(cache.max_len), []
    for index in range(rows.rule.limit):
        hidden, similarity = network.decoder_block(index, hidden, cache, rows.slots, rows.positions, rope)
        similarities.append(similarity)
        depth = index + 1
        if rows.rule.can_exit(depth) and any(rows.rule.exits(depth, similarity.tolist())):
            break
    return hidden, similarities


def run_river(network: Network, cache: KVCache, rows: Rows, hidden: Tensor, first: int) -> Tensor:
    """Exit layers first..L-1, on the same places of the cache."""
    rope = network.rope(cache.max_len)
    for index in range(first, len(network.layers)):
        hidden, _ = network.exit_layer(index, hidden, cache, rows.slots, rows.positions, rope)
    return hidden
