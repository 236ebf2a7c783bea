"""How many tokens the river drafts for a request."""

from torch import Tensor

from .network import Network


class Drafting:
    """A number, or "auto": by how many were right so far, and by how sure the river is of each."""

    # A margin of logits: about half of the drafts below it are wrong, few of those above.
    SURE = 1.0
    PRIOR, PRIOR_WEIGHT = 0.8, 4.0  # of the share of right drafts, before any was made
    MEMORY = 0.95  # what a cycle's result counts for after the next one
    LEAST_OFTEN = 16  # cycles without a draft, after which one is tried again

    def __init__(self, draft_tokens: int | str, temperature: float = 0.0):
        self.draft_tokens = draft_tokens
        self.sure = 0.0  # the least margin that another may follow
        if draft_tokens == "auto":  # below temperature 1 margins are larger, and so are the errors in them
            self.sure = self.SURE / max(min(temperature, 1.0) or 1.0, 1e-30)
        self._right, self._tried, self._since = self.PRIOR * self.PRIOR_WEIGHT, self.PRIOR_WEIGHT, 0

    def choose(self, most: int, draft_cost: float, stops_early: bool) -> int:
        """0 to `most`; a draft step costs `draft_cost` verifications.

        stops_early: these are the most that will be made, and a draft is made only if it is likely to count.
        Then all are worth it if one is.
        """
        if self.draft_tokens != "auto":
            return min(most, self.draft_tokens)
        right, best = self._right / self._tried, 0
        expected = gain = 1.0
        for drafts in range(1, most + 1):
            expected += right**drafts
            if expected / (1 + drafts * draft_cost) > gain:
                best, gain = drafts, expected / (1 + drafts * draft_cost)
        if stops_early and best:
            best = most
        return best or int(most > 0 and self._since >= self.LEAST_OFTEN)

    def learn(self, drafts: int, accepted: int) -> None:
        """What became of a cycle's drafts. Those after the first wrong one say nothing."""
        tried = min(drafts, accepted + 1)
        self._right = self.MEMORY * self._right + accepted
        self._tried = self.MEMORY * self._tried + tried
        self._since = 0 if drafts else self._since + 1


def draft_cost(network: Network) -> float:
    """Bytes of weights that a draft step reads, over those of a verification."""
    river = sum(bytes_of(layer.river) for layer in network.layers)
    backbone = sum(bytes_of(layer.weights) for layer in network.layers)
    return (river + network.river_head_bytes) / (backbone + network.lm_head.nbytes)


def bytes_of(weights) -> int:
    """Of all tensors of a layer's weights."""
    return sum(tensor.nbytes for tensor in vars(weights).values() if isinstance(tensor, Tensor))
