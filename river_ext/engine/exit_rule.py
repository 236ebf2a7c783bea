"""The exit rule: after which backbone layer a token may leave for the exit river.

A row may exit after its backbone layer number `depth` (1-based) when its similarity is strictly above its
threshold and `depth >= min_layers`. The batch policy turns these wishes into the mask of rows that exit:
"min", the paper's, lets all active rows exit together or none of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import RiverError

BATCH_POLICIES = ("min",)


@dataclass(frozen=True)
class ExitRule:
    """Thresholds and min_layers by row; rows with `active` False take no part in a decision.

    `limit` is the number of backbone layers that any token may run: the model's depth, less for a prefill of
    fixed depth, 0 for the pure river.
    """

    thresholds: tuple[float, ...]
    min_layers: tuple[int, ...]
    active: tuple[bool, ...]
    limit: int

    @classmethod
    def of(
        cls, thresholds: Sequence[float], min_layers: Sequence[int], limit: int, active=None
    ) -> "ExitRule":
        """The rule for these rows; thresholds are rounded to fp32, what the similarities are in."""
        rounded = torch.tensor(thresholds, dtype=torch.float64).float()
        if rounded.isnan().any():
            raise RiverError("threshold is NaN; accepted: any number, inf (never exit) included")
        active = (True,) * len(thresholds) if active is None else tuple(active)
        return cls(tuple(rounded.tolist()), tuple(min_layers), active, limit)

    def can_exit(self, depth: int) -> bool:
        """Whether `exits` is worth asking after `depth` layers. No similarity exceeds 1, so inf never is."""
        rows = zip(self.thresholds, self.min_layers, self.active, strict=True)
        return all(threshold < 1 and depth >= least for threshold, least, active in rows if active)

    def exits(self, depth: int, similarities: Sequence[float]) -> list[bool]:
        """The rows that exit after `depth` layers, given the similarity that each row has there."""
        wishes = [
            s > threshold and depth >= least
            for s, threshold, least in zip(similarities, self.thresholds, self.min_layers, strict=True)
        ]
        together = all(wish for wish, active in zip(wishes, self.active, strict=True) if active)
        return [together and active for active in self.active]

    def keep(self, rows: Sequence[int]) -> "ExitRule":
        """The rule for some of the rows."""
        thresholds, min_layers, active = (
            tuple(values[row] for row in rows) for values in (self.thresholds, self.min_layers, self.active)
        )
        return ExitRule(thresholds, min_layers, active, self.limit)
