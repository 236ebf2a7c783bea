"""From hidden states to tokens: greedy, temperature, top-k, top-p, min-p.

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
    min_p: float = 0.0  # draw among the tokens at least this times as likely as the likeliest; 0 = all

    @property
    def filters(self) -> bool:
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True)
class Drawing:
    """How each row draws: the arguments of `ops.sample` beside the logits, [T] each."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor  # of the tokens that are drawn

    @classmethod
    def of(cls, sampling: Sampling, seeds: Tensor, positions: Tensor) -> "Drawing":
        """Every row by the same options; seeds are int64 [T], positions int32 [T]."""
        drawing = cls(
            temperature=torch.empty_like(positions, dtype=torch.float32),
            top_k=torch.empty_like(positions),
            top_p=torch.empty_like(positions, dtype=torch.float32),
            min_p=torch.empty_like(positions, dtype=torch.float32),
            seeds=seeds,
            positions=positions,
        )
        drawing.fill(sampling)
        return drawing

    def fill(self, sampling: Sampling) -> None:
        self.temperature.fill_(sampling.temperature)
        self.top_k.fill_(sampling.top_k)
        self.top_p.fill_(sampling.top_p)
        self.min_p.fill_(sampling.min_p)


def next_tokens(
    network: Network,
    hidden: Tensor,
    sampling: Sampling,
    seeds: Tensor,
    positions: Tensor,
    return_logits: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`draw` for rows with the same options; seeds are int64 [T], positions int32 [T] of the tokens drawn."""
    drawing = Drawing.of(sampling, seeds, positions) if sampling.temperature > 0 else None
    return draw(network, hidden, drawing, sampling.filters, return_logits)


def draw(
    network: Network, hidden: Tensor, drawing: Drawing | None, filters: bool, return_logits: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Final norm, head and choice of a token per row.

    hidden is [T, hidden_size]; without a drawing, all rows are greedy. The head draws by itself unless there
    are filters: those need the logits of all tokens. Returns tokens int64 [T], -1 where a row has none, and,
    if asked for, fp32 logits [T, vocab_size] (before any filter).
    """
    in_head = {}
    if drawing is not None and not filters:
        in_head = {name: getattr(drawing, name) for name in ("temperature", "seeds", "positions")}
    tokens, logits = ops.lm_head(
        hidden,
        network.norm,
        network.lm_head,
        network.config.rms_norm_eps,
        return_logits=return_logits or filters,
        **in_head,
    )
    if filters:
        tokens, _ = ops.sample(logits, **vars(drawing))
    return tokens, logits if return_logits else None
