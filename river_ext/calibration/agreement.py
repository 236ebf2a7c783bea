"""How often the river says what the backbone says, on given texts: teacher-forced, no token is generated."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.cache import KVCache
from ..engine.matmul import MatmulPrompt, linear, rms_norm
from ..engine.network import Network
from ..errors import RiverError

ROWS = 64  # whose logits are in memory at a time


@dataclass(frozen=True)
class Agreement:
    """Of the river at depth 0, every layer and the whole cache W4, with full depth."""

    tokens: int  # positions compared
    agreement: float  # share of positions with the same likeliest next token
    kl: float  # mean KL(full depth || river) of the next token, in nats


@torch.inference_mode()
def compare(network: Network, texts: Sequence[Sequence[int]]) -> Agreement:
    """Compares backbone and river at every position of texts, given as token ids."""
    same, divergence, count = 0, 0.0, 0
    for tokens in texts:
        hidden = network.embed(torch.tensor(tokens, device=network.device))
        ends = [_through(network, hidden, layer) for layer in ("decoder_block", "exit_layer")]
        for full, river in zip(*(end.split(ROWS) for end in ends), strict=True):
            p, q = (_log_probabilities(network, rows) for rows in (full, river))
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            divergence += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        count += len(tokens)
    return Agreement(count, same / count, max(0.0, divergence / count))


def _through(network: Network, hidden: Tensor, layer: str) -> Tensor:
    """The rows of one text through all layers of a kind."""
    cache = KVCache(network.config, 1, len(hidden), network.dtype, network.device)
    prompt = MatmulPrompt(network, cache, slot=0, start=0, length=len(hidden))
    for index in range(network.config.num_hidden_layers):
        hidden = getattr(prompt, layer)(index)(0, hidden)
    return hidden


def _log_probabilities(network: Network, hidden: Tensor) -> Tensor:
    config = network.config
    logits = linear(rms_norm(hidden, network.norm, config.rms_norm_eps), network.lm_head)
    logits = logits / config.logits_scaling
    if not logits.isfinite().all():
        raise RiverError(f"logits of a text became NaN or infinite in {network.dtype}; accepted: finite ones")
    return logits.log_softmax(-1)
