"""Granite's multipliers, as the ops take them.

    hidden = embedding_multiplier * embedding
    hidden += residual_multiplier * what attention, or the feed-forward part, makes of norm(hidden)
    scores = attention_multiplier * query . key
    logits = head(norm(hidden)) / logits_scaling

What is kept is not hidden but hidden / embedding_multiplier, so that embeddings are used as they are stored.
To that, a part adds residual_multiplier / embedding_multiplier of what it makes. Norms have the same results,
as the epsilon under their root is divided by embedding_multiplier squared; so have similarities. Norms of q
and k would want the epsilon as it is, but no family has both those and multipliers.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from .json_object import Reader

if TYPE_CHECKING:
    from .config import ModelConfig

MULTIPLIERS = "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"


def with_multipliers(config: "ModelConfig", top: Reader) -> "ModelConfig":
    """The config of a model that has multipliers: keys of `top`, 1 if absent, as in transformers."""
    embedding, attention, residual, logits = (top.number(key, 1e-4, 1e4, default=1.0) for key in MULTIPLIERS)
    return replace(
        config,
        rms_norm_eps=config.rms_norm_eps / embedding**2,
        softmax_scale=attention,
        residual_multiplier=residual / embedding,
        logits_scaling=logits,
    )
