"""Prefill: all tokens of one prompt through the layers, at one exit depth for the whole sequence.

Layer by layer: a layer takes all tokens before the next one starts, so that the depth may be decided from
all of them. On the CPU the tokens go through the decoding ops, which take many rows there: bit for bit what
decoding them one at a time gives. On a GPU they go through matrix products (matmul.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..checks import short
from ..errors import RiverError
from .cache import KVCache
from .exit_rule import ExitRule
from .matmul import MatmulPrompt
from .network import Network
from .sampling import Sampling, next_tokens
from .step import StepOutput

POLICIES = "'full', 'depth:k', 'min' or 'last'"


@dataclass(frozen=True)
class PrefillPolicy:
    """How many backbone layers a prompt runs: at most `limit`, fewer where the rule is met."""

    limit: int
    judged: str | None = None  # the similarity the rule looks at: "min" over all tokens, the "last", none

    @classmethod
    def parse(cls, text: str, depth: int) -> "PrefillPolicy":
        if isinstance(text, str):
            if text == "full":
                return cls(depth)
            if text in ("min", "last"):
                return cls(depth, judged=text)
            name, _, number = text.partition(":")
            digits = number.isascii() and number.isdigit() and len(number) <= 9
            if name == "depth" and digits and int(number) <= depth:
                return cls(int(number))
        raise RiverError(f"prefill={short(text)}; accepted: {POLICIES} with k from 0 to {depth}")


ROWS_AT_A_TIME = 256  # rows that the ops take together: weights come from memory once for all of them


class OpsPrompt:
    """The tokens of a prompt at positions 0..n-1 of a slot, through the decoding ops."""

    def __init__(self, network: Network, cache: KVCache, slot: int, length: int):
        self.network, self.cache = network, cache
        self.rope = network.prompt_rope(length, cache.max_len)
        self.positions = torch.arange(length, dtype=torch.int32, device=network.device)
        self.slots = torch.full_like(self.positions, slot)

    def decoder_block(self, index: int, hidden: Tensor) -> Tensor:
        """hidden [n, hidden_size] through a backbone layer, which writes K and V of all n positions."""
        return self._by_rows(self.network.decoder_block, index, hidden)

    def exit_layer(self, index: int, hidden: Tensor) -> Tensor:
        """The same through its exit layer."""
        return self._by_rows(self.network.exit_layer, index, hidden)

    def _by_rows(self, layer, index: int, hidden: Tensor) -> Tensor:
        rows = zip(*(t.split(ROWS_AT_A_TIME) for t in (hidden, self.slots, self.positions)), strict=True)
        return torch.cat([layer(index, part, self.cache, *place, self.rope)[0] for part, *place in rows])


@torch.inference_mode()
def prefill(
    network: Network,
    cache: KVCache,
    slot: int,
    tokens: list[int],
    rule: ExitRule,
    policy: PrefillPolicy,
    sampling: Sampling,
    seed: int = 0,
    return_logits: bool = False,
) -> StepOutput:
    """Fills positions 0..len(tokens)-1 of a slot in all layers, and draws the first new token.

    The output's exit depth is the prompt's, its similarities are those of the last prompt token.
    """
    kind = MatmulPrompt if network.device.type == "cuda" else OpsPrompt
    prompt = kind(network, cache, slot, len(tokens))
    hidden = network.embed(torch.tensor(tokens, device=network.device))
    hidden, similarities = prefill_backbone(prompt, hidden, rule, policy)
    depth = len(similarities)
    hidden = prefill_river(prompt, hidden, first=depth)
    seeds = torch.tensor([seed], dtype=torch.int64, device=network.device)
    position = torch.tensor([len(tokens)], dtype=torch.int32, device=network.device)
    drawn, logits = next_tokens(network, hidden[-1:], sampling, seeds, position, return_logits=return_logits)
    return StepOutput(drawn, logits, [depth], [similarities])


def prefill_backbone(
    prompt: OpsPrompt | MatmulPrompt, hidden: Tensor, rule: ExitRule, policy: PrefillPolicy
) -> tuple[Tensor, list[float]]:
    """Decoder blocks until the policy says so: hidden, and the last token's similarity at each layer run."""
    similarities = []
    for index in range(policy.limit):
        before, depth = hidden, index + 1
        hidden = prompt.decoder_block(index, hidden)
        similarities.append(ops.state_similarity(before[-1:], hidden[-1:]).item())
        if policy.judged and rule.can_exit(depth):
            judged = similarities[-1] if policy.judged == "last" else lowest_similarity(before, hidden)
            if any(rule.exits(depth, [judged])):
                break
    return hidden, similarities


def prefill_river(prompt: OpsPrompt | MatmulPrompt, hidden: Tensor, first: int) -> Tensor:
    """Exit layers first..L-1."""
    for index in range(first, prompt.network.config.num_hidden_layers):
        hidden = prompt.exit_layer(index, hidden)
    return hidden


def lowest_similarity(before: Tensor, after: Tensor) -> float:
    blocks = zip(before.split(ops.MAX_ROWS), after.split(ops.MAX_ROWS), strict=True)
    return min(ops.state_similarity(x, y).min().item() for x, y in blocks)
