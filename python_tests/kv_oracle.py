"""What requests get under a KV strategy, written down without the engine: a token and a layer at a time.

The strategies are told in other words than the engine's. Under "mask" a layer has a cache without gaps: what
is missing was never in it. Under "recompute" every token runs all layers, and what it would have left out is
there from the beginning. Under "propagate" a whole decoder block writes K and V, and its output is dropped.
"""

import math

import torch
from oracle import head

from river_ext import ops
from river_ext.engine.cache import KVCache
from river_ext.engine.network import Place
from river_ext.engine.request import request


class Sequence:
    """One request: its tokens, exit depths and similarities, and the cache that it has by then."""

    def __init__(self, model, prompt, options):
        self.network, self.asked = model.network, request(model.config, None, prompt, options)
        self.strategy, self.layers = self.asked.kv_strategy, model.config.num_hidden_layers
        self.rotates_anew_after = model.config.rotates_anew_after
        self.cache = KVCache(model.config, 1, self.asked.positions, self.network.dtype)
        self.tokens, self.depths, self.similarities, self.logits, self.reason = [], [], [], [], None
        self.prefill()

    def prefill(self):
        """All its tokens through all layers, and the next one from that."""
        self.cache.k.fill_(math.nan)
        self.cache.v.fill_(math.nan)
        self.present = [[] for _ in range(self.layers)]  # positions in a layer's cache, in its order
        tokens = self.asked.prompt + self.tokens
        self.deep = [self.layers] * len(tokens)  # how deep each position ran
        self.rope = self.network.prompt_rope(len(tokens), self.cache.max_len)
        for position, token in enumerate(tokens):
            self.begin(token, position)
            while self.depth < self.layers:
                self.step()
        self.end()
        self.rope = self.network.rope(self.cache.max_len)

    @property
    def rotates_anew(self):
        return len(self.asked.prompt) + len(self.tokens) - 1 == self.rotates_anew_after

    def begin(self, token, position):
        self.position, self.depth, self.own_similarities = position, 0, []
        self.hidden = self.network.embed(torch.tensor([token]))
        if self.strategy == "recompute":
            chain = [(self.hidden, None)]
            for layer in range(self.layers):
                chain.append(self.block(layer, chain[-1][0]))
            self.chain = chain[1:]

    def begin_next(self):
        self.deep.append(0)
        self.begin(self.tokens[-1], len(self.asked.prompt) + len(self.tokens) - 1)

    def block(self, layer, hidden):
        """The token through a backbone layer, whose cache has no gaps."""
        self.present[layer].append(self.position)
        present = self.present[layer]
        cos, sin = self.rope.cos.clone(), self.rope.sin.clone()
        cos[: len(present)], sin[: len(present)] = self.rope.cos[present], self.rope.sin[present]
        place = Place(
            self.cache,
            slots=torch.zeros(1, dtype=torch.int32),
            positions=torch.tensor([len(present) - 1], dtype=torch.int32),
            rope=self.rope._replace(cos=cos, sin=sin),
        )
        return self.network.layers[layer].block(hidden, place)

    def step(self):
        """Another layer."""
        if self.strategy == "recompute":
            self.hidden, similarity = self.chain[self.depth]
        else:
            self.hidden, similarity = self.block(self.depth, self.hidden)
        self.depth += 1
        self.own_similarities.append(similarity.item())

    @property
    def must_leave(self):
        limit = self.depths[-1] if self.strategy == "monotone" else self.layers
        return self.depth == min(limit, self.asked.rule.limit)

    @property
    def may_leave(self):
        similarity, rule = self.own_similarities[-1], self.asked.rule
        above = similarity > rule.thresholds[self.depth - 1]
        return self.must_leave or (self.depth >= rule.min_layers and above)

    def end(self):
        """The token leaves, and the next one is drawn."""
        asked, drawn_at = self.asked, self.position + 1
        if self.strategy == "propagate":
            for layer in range(self.depth, self.layers):
                self.block(layer, self.hidden)
        sampling, logits = asked.sampling, head(self.network, self.hidden, by_river=False)
        token, _ = ops.sample(
            logits,
            torch.tensor([sampling.temperature]),
            torch.tensor([sampling.top_k], dtype=torch.int32),
            torch.tensor([sampling.top_p]),
            torch.tensor([sampling.min_p]),
            torch.tensor([sampling.seed]),
            torch.tensor([drawn_at], dtype=torch.int32),
        )
        self.deep[-1] = self.depth
        self.tokens.append(token.item())
        self.depths.append(self.depth)
        self.similarities.append(self.own_similarities)
        self.logits.append(logits[0])
        if self.tokens[-1] in asked.stop_tokens:
            self.reason = "stop"
        elif len(self.tokens) == asked.max_new_tokens:
            self.reason = "length"

    def written(self):
        """K and V [layers, kv_heads, positions, head_dim] that the engine has: NaN where nothing was."""
        found = []
        for cache in (self.cache.k, self.cache.v):
            whole = torch.full_like(cache[:, 0], math.nan)
            for layer, positions in enumerate(self.present):
                whole[layer][:, positions] = cache[layer, 0][:, : len(positions)]
                if self.strategy == "recompute":  # nobody has been there since
                    last = max(position for position, depth in enumerate(self.deep) if depth > layer)
                    whole[layer][:, last + 1 :] = math.nan
            found.append(whole)
        return found


def sequences(model, requests, together=False):
    """Of (prompt, options): each alone, or all that have the same strategy together."""
    everyone = [Sequence(model, prompt, options) for prompt, options in requests]
    while running := [one for one in everyone if one.reason is None]:
        groups = [[one] for one in running]
        if together:
            names = {one.strategy for one in running}
            groups = [[one for one in running if one.strategy == name] for name in names]
        for group in groups:
            token_of(group)
    return everyone


def token_of(group):
    """The next token of sequences that leave together."""
    if len(group) == 1 and group[0].rotates_anew:
        return group[0].prefill()
    for one in group:
        one.begin_next()
    while True:
        for one in group:
            one.step()
        if all(one.may_leave for one in group) or any(one.must_leave for one in group):
            break
    for one in group:
        one.end()


def assert_same(output, expected, atol=1e-5):
    """A GenerationOutput; where the strategy was told in other words, sums may have another order."""
    assert output.tokens == expected.tokens
    assert output.exit_depths == expected.depths
    assert output.finish_reason == expected.reason
    if expected.strategy in ("recompute", "monotone"):
        assert output.similarities == expected.similarities
    for own, others in zip(output.similarities, expected.similarities, strict=True):
        torch.testing.assert_close(torch.tensor(own), torch.tensor(others), atol=atol, rtol=0)
    if output.logits is not None:
        torch.testing.assert_close(output.logits, torch.stack(expected.logits), atol=1e-3, rtol=0)
