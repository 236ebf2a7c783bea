"""From hidden states to tokens: greedy, temperature, top-k, top-p.

Sampling is Gumbel-max: the argmax of logits / temperature + noise, the noise being a function of
(seed, position of the token drawn, token id) alone. The same seed and prompt give the same tokens in
any batch. Ties go to the lowest id.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .network import Network
from .reference import gumbel


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # draw among the k likeliest tokens; 0 = all
    top_p: float = 1.0  # draw among the likeliest tokens that together have at least this probability

    @property
    def filters(self) -> bool:
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


def next_tokens(
    network: Network,
    hidden: Tensor,
    sampling: Sampling,
    seeds: Tensor,
    positions: Tensor,
    return_logits: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Final norm, head and choice of a token per row.

    hidden is [T, hidden_size], seeds int64 [T], positions int32 [T] those of the tokens that are drawn.
    Returns tokens int64 [T] and, if asked for, fp32 logits [T, vocab_size] (before any filter).
    """
    drawn = {}
    if sampling.temperature > 0 and not sampling.filters:
        temperature = torch.full_like(positions, sampling.temperature, dtype=torch.float32)
        drawn = {"temperature": temperature, "seeds": seeds, "positions": positions}
    tokens, logits = ops.lm_head(
        hidden,
        network.norm,
        network.lm_head,
        network.config.rms_norm_eps,
        return_logits=return_logits or sampling.filters,
        **drawn,
    )
    if sampling.filters:
        rows = zip(logits, seeds.tolist(), positions.tolist(), strict=True)
        tokens = torch.stack([draw(row, sampling, seed, position) for row, seed, position in rows])
    return tokens, logits if return_logits else None


def draw(logits: Tensor, sampling: Sampling, seed: int, position: int) -> Tensor:
    """One token from filtered fp32 logits [vocab_size], as an int64 scalar tensor."""
    scores = filtered(logits, sampling) + gumbel(seed, position, logits.shape[0]).to(logits.device)
    return (scores == scores.max()).nonzero()[0, 0]  # argmax does not promise the lowest id among ties


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits / temperature, with -inf for the tokens that top_k and top_p rule out.

    Tokens are ranked by logit, ties by id. top_p looks at what top_k left, and keeps at least one token.
    """
    logits = torch.where(logits.isnan(), float("-inf"), logits) / max(sampling.temperature, 1e-30)
    ranked, order = logits.sort(descending=True, stable=True)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if sampling.top_k:
        keep[sampling.top_k :] = False
    if sampling.top_p < 1:
        probability = torch.softmax(ranked.masked_fill(~keep, float("-inf")), dim=0)
        before = probability.cumsum(0) - probability  # what the likelier tokens have together
        keep &= before < sampling.top_p
        keep[0] = True
    return logits.masked_fill(torch.empty_like(keep).scatter_(0, order, ~keep), float("-inf"))
