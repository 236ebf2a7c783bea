"""From hidden states to tokens: greedy, temperature, top-k, top-p, min-p.

Sampling is Gumbel-max: the argmax of logits / temperature + noise, the noise being a function of
(seed, position of the token drawn, token id) alone. The same seed and prompt give the same tokens in
any batch. Ties go to the lowest id. A row of which a logit is NaN or infinite has no token: -1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .network import Network


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are drawn; numbers as fp32 has them."""

    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # draw among the k likeliest tokens; 0 = all
    top_p: float = 1.0  # draw among the likeliest tokens that together have at least this probability
    min_p: float = 0.0  # draw among the tokens at least this times as likely as the likeliest; 0 = all
    seed: int = 0

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
    def greedy(cls, positions: Tensor) -> "Drawing":
        """Every row greedy; positions are int32 [T]."""
        rows, device = len(positions), positions.device
        drawing = cls(
            temperature=torch.empty(rows, device=device, dtype=torch.float32),
            top_k=torch.empty_like(positions),
            top_p=torch.empty(rows, device=device, dtype=torch.float32),
            min_p=torch.empty(rows, device=device, dtype=torch.float32),
            seeds=torch.empty(rows, device=device, dtype=torch.int64),
            positions=positions,
        )
        drawing.fill([Sampling()] * rows)
        return drawing

    def head(self, rows: int) -> "Drawing":
        """Of the first rows."""
        return Drawing(**{name: tensor[:rows] for name, tensor in vars(self).items()})

    def fill(self, samplings: Sequence[Sampling]) -> None:
        """Row by row; rows beyond them stay as they are."""
        for name, values in (
            ("temperature", [sampling.temperature for sampling in samplings]),
            ("top_k", [sampling.top_k for sampling in samplings]),
            ("top_p", [sampling.top_p for sampling in samplings]),
            ("min_p", [sampling.min_p for sampling in samplings]),
            ("seeds", [sampling.seed for sampling in samplings]),
        ):
            tensor = getattr(self, name)
            tensor[: len(values)] = tensor.new_tensor(values)


def draw(
    network: Network,
    hidden: Tensor,
    drawing: Drawing,
    filters: bool,
    return_logits: bool = False,
    river_head: bool | Tensor = False,
    margins: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Final norm, head and choice of a token per row.

    hidden is [T, hidden_size]; river_head says whether the head is the river's, or of which rows: bool [T].
    The head draws by itself unless there are filters: those need the logits of all tokens. Returns tokens
    int64 [T], -1 where a row has none, and fp32 logits [T, vocab_size] before any filter, or [0, vocab_size]
    where neither the caller nor a filter needs them; and fp32 margins [T] by which the best token of all is
    ahead, which cost more where there are filters.
    """
    names = () if filters and not margins else ("temperature", "seeds", "positions")
    tokens, logits, ahead = network.head(
        hidden,
        river_head,
        return_logits=return_logits or filters,
        **{name: getattr(drawing, name) for name in names},
    )
    if filters:
        tokens, _ = ops.sample(logits, **vars(drawing))
    return tokens, logits, ahead
