"""A threshold for each layer: rules that are learnt from answers, to be measured on others.

What a token loses by leaving after a depth is measured first, for every depth: full depth's answers are fed
to the model as often as there are depths, and each time all tokens leave at that one. With the similarities
of full depth this is a table of depths and tokens, which says of any rule where each token would leave, and
whether another token would be drawn there. Only nearly: in use the tokens before it leave elsewhere. So a
rule is found by the table alone, and `curve` measures what it is worth.

A rule weighs layers against tokens: a different token costs as much as so many layers, its price. Each price
gives a rule. The search goes through the depths one at a time and takes the threshold with the lowest cost
while the others stay, until none changes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RiverError
from ..model import Model
from .curve import Answer, feed

PRICES = (1024, 256, 64, 32, 16, 8, 4)  # of a different token, in full depths
SHARES = 16  # a threshold lets so many sixteenths of the tokens leave: a finer one would be learnt by heart
NEVER, ALWAYS = 1.0, -2.0  # as thresholds
MOST_SWEEPS = 20

Rule = tuple[float, ...]  # a threshold for each layer


@dataclass(frozen=True)
class ExitTable:
    """What becomes of tokens at each depth."""

    layers: int
    first: int  # depth at which a token may leave
    similarities: Tensor  # fp32 [depths, tokens], depths from the first one to layers - 1
    different: Tensor  # bool [depths, tokens]: another token is drawn, if it and those before it leave there

    def exits(self, thresholds: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Under a threshold for each of the depths: exit depths [tokens], and what is different [tokens]."""
        above = self.similarities > self.similarities.new_tensor(thresholds)[:, None]
        last = torch.ones_like(above[:1])
        index = torch.cat([above, last]).int().argmax(0)  # of the first depth at which it is above
        return self.first + index, torch.cat([self.different, ~last]).gather(0, index[None])[0]

    def rule(self, thresholds: Sequence[float]) -> Rule:
        """As `Model.generate` takes it."""
        return (NEVER,) * (self.first - 1) + tuple(thresholds) + (NEVER,)


def exit_table(
    model: Model, answers: Sequence[Answer], advance: Callable[[], None], min_layers: int, river_head: str
) -> ExitTable:
    """Feeds the answers once for each depth, and calls `advance` after each."""
    layers = model.config.num_hidden_layers
    decoded = [row for answer in answers for row in answer.similarities[1:]]  # the first is the prompt's
    if not decoded or min_layers >= layers:
        raise RiverError(
            f"thresholds by layer with min_layers={min_layers} and {len(decoded)} decoded tokens to learn "
            f"from; accepted: min_layers below {layers}, and answers of more than one token"
        )
    different = []
    for depth in range(min_layers, layers):
        options, row = {"threshold": ALWAYS, "min_layers": depth, "river_head": river_head}, []
        for answer in answers:
            row += feed(model, answer, options)[0][1:]
            advance()
        different.append(row)
    similarities = torch.tensor(decoded)[:, min_layers - 1 : layers - 1].T.contiguous()
    return ExitTable(layers, min_layers, similarities, torch.tensor(different))


def search(table: ExitTable, price: float) -> Rule:
    """The rule with the lowest cost in layers, where a different token costs `price` layers."""
    depths = len(table.similarities)
    costs = (
        table.first + torch.arange(depths)[:, None] + price * table.different
    )  # of leaving: [depths, tokens]
    thresholds = [NEVER] * depths
    for _ in range(MOST_SWEEPS):
        before = list(thresholds)
        for index in reversed(range(depths)):
            thresholds[index] = NEVER
            left, different = table.exits(thresholds)
            saved = left + price * different - costs[index]  # by leaving here
            reached = left > table.first + index
            thresholds[index] = _best(table.similarities[index], saved * reached)
        if thresholds == before:
            break
    return table.rule(thresholds)


def _best(similarities: Tensor, saved: Tensor) -> float:
    """The threshold above which tokens save the most in all; of equal ones the strictest."""
    falling, order = similarities.sort(descending=True)
    counts = torch.arange(1, SHARES + 1) * len(order) // SHARES  # of tokens that leave
    bounds = torch.cat([falling, falling.new_tensor([ALWAYS])])[counts]
    totals = torch.stack([saved[similarities > bound].sum() for bound in bounds])
    best = int(totals.argmax())
    return float(bounds[best]) if totals[best] > 0 else NEVER


def candidates(table: ExitTable, thresholds: Sequence[float]) -> list[float | Rule]:
    """Thresholds and rules, from those with the fewest different tokens in the table on."""
    single = {t: (t,) * len(table.similarities) for t in thresholds}
    rules = (search(table, price * table.layers) for price in PRICES)
    own = slice(table.first - 1, table.layers - 1)
    found = single | {rule: rule[own] for rule in rules}

    def strictness(candidate: float | Rule) -> tuple[float, float]:
        left, different = table.exits(found[candidate])
        return float(different.sum()), -float(left.sum())

    return sorted(found, key=strictness)
