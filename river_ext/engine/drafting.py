"""How many tokens are drafted for a request, by the river or as quotes."""

from collections.abc import Sequence

from torch import Tensor

from .network import Network
from .quotes import Quotes


class Share:
    """Of drafts that were right, the latest counting most."""

    PRIOR, PRIOR_WEIGHT = 0.8, 4.0  # before any was made, and after a long time without
    MEMORY = 0.95  # what a cycle's result counts for after the next one

    def __init__(self) -> None:
        self._right = self._tried = 0.0

    @property
    def value(self) -> float:
        weight = self.PRIOR_WEIGHT
        return (self._right + self.PRIOR * weight) / (self._tried + weight)

    def learn(self, drafts: int, right: int) -> None:
        """What became of a cycle's drafts. Those after the first wrong one say nothing."""
        self._right = self.MEMORY * self._right + right
        self._tried = self.MEMORY * self._tried + min(drafts, right + 1)

    def expected(self, drafts: int) -> float:
        """New tokens of a cycle with so many drafts."""
        return sum(self.value**right for right in range(drafts + 1))


class Drafting:
    """A number of the river's, or "auto": by how many were right so far and how sure the river is of each.

    With "auto", what the text said before is quoted where that promises more: it takes no draft steps.
    """

    # A margin of logits: about half of the drafts below it are wrong, few of those above.
    SURE = 1.0

    def __init__(
        self,
        draft_tokens: int | str,
        temperature: float = 0.0,
        prompt: Sequence[int] = (),
        new_tokens: Sequence[int] = (),
    ):
        self.draft_tokens = draft_tokens
        self.sure = 0.0  # the least margin that another may follow
        self._quotes = None
        if draft_tokens == "auto":  # below temperature 1 margins are larger, and so are the errors in them
            self.sure = self.SURE / max(min(temperature, 1.0) or 1.0, 1e-30)
            self._quotes = Quotes(prompt, new_tokens)
        self._river, self._quoted = Share(), Share()
        self._gain = 1.0  # of the river's drafts: tokens of a cycle over its cost in verifications

    def choose(self, most: int, draft_cost: float, stops_early: bool) -> int:
        """0 to `most` drafts of the river; each costs `draft_cost` verifications.

        stops_early: these are the most that will be made, and a draft is made only if it is likely to count.
        Then all are worth it if one is.
        """
        if self.draft_tokens != "auto":
            return min(most, self.draft_tokens)
        best, self._gain = 0, 1.0
        for drafts in range(1, most + 1):
            gain = self._river.expected(drafts) / (1 + drafts * draft_cost)
            if gain > self._gain:
                best, self._gain = drafts, gain
        return most if stops_early and best else best

    def quote(self, drafts: Sequence[int], most: int) -> list[int]:
        """`most` drafts to follow these, or none: nothing fits, or the river's promise more."""
        if self._quotes is None or most == 0 or self._quoted.expected(most) <= self._gain:
            return []
        return self._quotes.find(drafts, most)

    def learn(self, drafts: int, quoted: int, right: int) -> None:
        """How many of a cycle's drafts were right, the first ones the river's and the last ones quoted."""
        self._river.learn(drafts, min(right, drafts))
        self._quoted.learn(quoted if right >= drafts else 0, max(0, right - drafts))


def draft_cost(network: Network) -> float:
    """Bytes of weights that a draft step reads, over those of a verification."""
    river = sum(bytes_of(layer.river) for layer in network.layers)
    backbone = sum(bytes_of(layer.weights) for layer in network.layers)
    return (river + network.river_head_bytes) / (backbone + network.lm_head.nbytes)


def bytes_of(weights) -> int:
    """Of all tensors of a layer's weights."""
    return sum(tensor.nbytes for tensor in vars(weights).values() if isinstance(tensor, Tensor))
