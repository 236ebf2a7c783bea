"""What goes into a step, and what comes out: one row per sequence that decodes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .drafting import Drafting
from .request import Request


class Row(NamedTuple):
    """A sequence at the start of its next step."""

    token: int  # that goes in,
    position: int  # at this place
    slot: int  # of the cache
    request: Request
    remaining: int  # tokens that may still be drawn
    drafting: Drafting | None = None  # in lossless mode
    exits: "Exits | None" = None  # for KV strategies that leave layers out


@dataclass(frozen=True)
class Exits:
    """Where the tokens of a sequence left the backbone, from its last prefill on."""

    depths: list[int] = field(default_factory=list)  # that of the prefill first
    # by position, of tokens that may go on: layers that they have run, and the hidden state after them
    unfinished: dict[int, tuple[int, Tensor]] = field(default_factory=dict)


class NewToken(NamedTuple):
    """What a step, or the end of a prefill, gives a sequence."""

    token: int  # negative: none, see not_finite
    exit_depth: int
    similarities: list[float]  # of the backbone layers that ran
    logits: Tensor | None = None  # fp32 [vocab_size], where the row wanted them
    drafted: bool = False  # it had been proposed


class Work(NamedTuple):
    """What a step computed for one request: a token that goes through a layer counts 1."""

    backbone_rows: int = 0
    recomputed_rows: int = 0  # of these, tokens of earlier steps that had left before that layer
    exit_rows: int = 0
    projected_rows: int = 0  # through no more of a backbone layer than the projections of K and V


class RowOutput(NamedTuple):
    """What a step gives one row."""

    tokens: list[NewToken]
    drafts: int = 0  # tokens that were proposed
    quotes: int = 0  # of these, the last ones, which the text had said before
    draft_seconds: float | None = 0.0  # that this took, where it can be told
    work: Work = Work()  # but that of a prefill


WIDER = {
    torch.float16: "load the model with dtype='bfloat16', or 'float32' on the CPU",
    torch.bfloat16: "load the model with dtype='float32' on the CPU, or look at the checkpoint's weights",
    torch.float32: "no dtype is wider, look at the checkpoint's weights",
}


def not_finite(dtype: torch.dtype, position: int, similarities: Sequence[float]) -> str:
    """Why a row has no token at a position, and what helps: a logit was NaN or infinite.

    Only a vector that is zero or not finite has a similarity of exactly 0, so the first one tells the layer.
    """
    layer = next((index for index, similarity in enumerate(similarities) if similarity == 0), None)
    where = "" if layer is None else f", and so are the hidden states from layer {layer} on"
    name = str(dtype).removeprefix("torch.")
    return f"no token at position {position}: its logits are NaN or infinite in {name}{where}; {WIDER[dtype]}"
