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

FIRST_RANKED = 1024  # tokens that top_p looks at before it looks at all


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
        rows = zip(tokens, logits, seeds.tolist(), positions.tolist(), (tokens < 0).tolist(), strict=True)
        tokens = torch.stack([
            none if failed else draw(row, sampling, seed, position)
            for none, row, seed, position, failed in rows
        ])  # fmt: skip
    return tokens, logits if return_logits else None


def draw(logits: Tensor, sampling: Sampling, seed: int, position: int) -> Tensor:
    """One token from filtered fp32 logits [vocab_size], all finite, as an int64 scalar tensor."""
    logits = logits / max(sampling.temperature, 1e-30)
    tokens = filtered(logits, sampling)
    noise = torch.from_numpy(ops._C.gumbel(seed, position, tokens.cpu().numpy()))
    scores = logits[tokens] + noise.to(logits.device)
    best = (scores == scores.max()).nonzero()[0, 0]  # argmax does not promise the lowest id among ties
    return tokens[best]


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """The ids, ascending, of the tokens that top_k and top_p leave of logits / temperature [vocab_size].

    Tokens are ranked by logit, ties by id. top_p looks at what top_k left, and keeps at least one token. Only
    as many are ranked as it takes: sorting a vocabulary costs as much as a step of a small model.
    """
    vocab_size = logits.shape[0]
    count = min(sampling.top_k or FIRST_RANKED, vocab_size)
    while True:
        tokens = likeliest(logits, count)
        ranked = logits[tokens]
        if sampling.top_p == 1:
            return tokens.sort().values
        total = (ranked if sampling.top_k else logits).logsumexp(0)
        probability = (ranked - total).exp()
        before = probability.cumsum(0) - probability  # what the likelier tokens have together
        keep = before < sampling.top_p
        keep[0] = True
        if sampling.top_k or count == vocab_size or not keep[-1]:
            return tokens[keep].sort().values
        count = vocab_size


def likeliest(logits: Tensor, count: int) -> Tensor:
    """The ids of the `count` largest logits, ranked, ties by id."""
    if count == logits.shape[0]:
        return logits.sort(descending=True, stable=True).indices
    tokens = (logits >= logits.topk(count).values[-1]).nonzero().flatten()
    return tokens[logits[tokens].sort(descending=True, stable=True).indices[:count]]
