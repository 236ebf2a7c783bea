"""From hidden states to tokens: greedy, temperature, top-k, top-p.

Sampling is Gumbel-max: the argmax of logits / temperature + noise, the noise being a function of
(seed, position of the token drawn, token id) alone. The same seed and prompt give the same tokens in
any batch. Ties go to the lowest id. A row of which a logit is NaN or infinite has no token: -1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .network import Network


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
    Returns tokens int64 [T], -1 where a row has none, and, if asked for, fp32 logits [T, vocab_size] (before
    any filter).
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
        tokens, _ = ops.sample(
            logits,
            temperature=torch.full_like(positions, sampling.temperature, dtype=torch.float32),
            top_k=torch.full_like(positions, sampling.top_k),
            top_p=torch.full_like(positions, sampling.top_p, dtype=torch.float32),
            min_p=torch.zeros_like(positions, dtype=torch.float32),
            seeds=seeds,
            positions=positions,
        )
    return tokens, logits if return_logits else None
