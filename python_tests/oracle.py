"""What a request gets alone, written down without the engine: one token at a time through the ops."""

import math
from dataclasses import replace

import torch

from river_ext import ops
from river_ext.engine.cache import KVCache
from river_ext.engine.network import Place
from river_ext.engine.request import request


def oracle(model, prompt, **options):
    """(tokens, exit depths, similarities, finish reason, cache) of a request."""
    network, asked = model.network, request(model.config, model.text, prompt, options)
    assert not asked.stop, "stop strings are the text's business"
    cache = KVCache(model.config, 1, asked.positions, network.dtype, network.device)
    slots, rope = torch.zeros(1, dtype=torch.int32), None
    layers, drawn = network.layers, []

    def layer(index, exits, hidden, position):
        place = Place(cache, slots, torch.tensor([position], dtype=torch.int32), rope)
        return (layers[index].exit if exits else layers[index].block)(hidden, place)

    def draw(hidden, position, depth, similarities, prefilled=False):
        by_river = asked.river_head and (not prefilled or asked.rule.limit == 0)
        sampling, logits = asked.sampling, head(network, hidden, by_river)
        token, _ = ops.sample(
            logits,
            *(torch.tensor([value]) for value in (sampling.temperature,)),
            torch.tensor([sampling.top_k], dtype=torch.int32),
            torch.tensor([sampling.top_p]),
            torch.tensor([sampling.min_p]),
            torch.tensor([sampling.seed]),
            torch.tensor([position], dtype=torch.int32),
        )
        drawn.append((token.item(), depth, similarities))
        if token.item() in asked.stop_tokens:
            return "stop"
        return "length" if len(drawn) == asked.max_new_tokens else None

    def prefill():
        nonlocal rope
        tokens = asked.prompt + [token for token, *_ in drawn]
        rope = network.prompt_rope(len(tokens), cache.max_len)
        hidden, *seen = _prefill(replace(asked, prompt=tokens), network, layer)
        rope = network.rope(cache.max_len)
        return draw(hidden, len(tokens), *seen, prefilled=True)

    reason = prefill()
    while reason is None:
        position, similarities = len(asked.prompt) + len(drawn) - 1, []
        if position == model.config.rotates_anew_after:
            reason = prefill()
            continue
        hidden, exits = network.embed(torch.tensor([drawn[-1][0]])), asked.rule.limit == 0
        for index in range(len(layers)):
            hidden, similarity = layer(index, exits, hidden, position)
            if not exits:
                similarities.append(similarity.item())
                exits = index + 1 >= asked.rule.min_layers and similarities[-1] > asked.rule.thresholds[index]
                exits = exits or index + 1 == asked.rule.limit
        reason = draw(hidden, position + 1, len(similarities), similarities)
    return (*map(list, zip(*drawn, strict=True)), reason, cache)


def head(network, hidden, by_river):
    config = network.config
    options = {"rms_norm_eps": config.rms_norm_eps, "logits_scaling": config.logits_scaling}
    if by_river:
        return ops.lm_head_w4(hidden, network.norm, network.lm_head_w4, config.vocab_size, **options)[1]
    return ops.lm_head(hidden, network.norm, network.lm_head, **options)[1]


def _prefill(asked, network, layer):
    """Hidden state of the last token, depth, and its similarities: layer by layer, token by token."""
    policy, rule = asked.prefill, asked.rule
    hidden = [network.embed(torch.tensor([token])) for token in asked.prompt]
    last, depth = [], policy.limit
    for index in range(len(network.layers)):
        outputs = [layer(index, index >= depth, row, position) for position, row in enumerate(hidden)]
        hidden = [row for row, _ in outputs]
        if index >= depth:
            continue
        last.append(outputs[-1][1].item())
        lowest = last[-1] if policy.judged == "last" else min(s.item() for _, s in outputs)
        if policy.judged and index + 1 >= rule.min_layers and lowest > rule.thresholds[index]:
            depth = index + 1
    return hidden[-1], depth, last


def same(output, expected) -> bool:
    """Whether a GenerationOutput is what the oracle says, bit for bit."""
    tokens, depths, similarities, reason, _ = expected
    nan_free = not any(math.isnan(s) for row in output.similarities for s in row)
    return nan_free and (output.tokens, output.exit_depths, output.similarities, output.finish_reason) == (
        tokens,
        depths,
        similarities,
        reason,
    )
