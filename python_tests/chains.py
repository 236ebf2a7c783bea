"""Rows that go through a few dual_layers, each by its own rules: what must hold of them on every backend."""

import torch
from blocks import Block, assert_close, int32

from river_ext import reference

LAYERS = 4


class Chain:
    """Random layers, rows and rules. Some rows are neighbours in one slot, some are inactive."""

    def __init__(self, shape, dtype, rows, seed, layers=LAYERS):
        g = torch.Generator().manual_seed(seed)
        self.dtype, self.rows, self.layers = dtype, rows, layers
        self.blocks = [Block(shape, dtype, seed=layers * seed + layer) for layer in range(layers)]
        self.hidden = self.blocks[0].random(rows, shape.hidden_size)
        self.caches = [block.caches() for block in self.blocks]
        self.slots, self.positions = places(shape, rows, g)
        kind = torch.randint(0, 4, (rows,), generator=g)
        thresholds = 0.6 + 0.4 * torch.rand(rows, generator=g)
        self.thresholds = thresholds.masked_fill(kind == 1, -2.0).masked_fill(kind == 2, float("inf"))
        self.min_layers = torch.randint(0, layers, (rows,), generator=g).int()
        self.limit = torch.randint(0, 2 * layers, (rows,), generator=g).int()

    def run(self, module, rows, caches, together=False):
        """The hidden vectors, `exited` and similarities of these rows, which alone are in flight."""
        rule, place = self._of(rows)
        exited, similarities = self.unwritten(rows)
        previous, hidden = None, self.hidden[rows]
        for index, (block, own) in enumerate(zip(self.blocks, caches, strict=True)):
            decision = (index, previous, *rule, exited, similarities)
            after = block.run_dual(module, decision, hidden, own, *place, together=together)
            previous, hidden = hidden, after
        return hidden, exited, similarities

    def _of(self, rows):
        rule = [t[rows] for t in (self.thresholds, self.min_layers, self.limit)]
        return rule, (self.slots[rows], self.positions[rows])

    def unwritten(self, rows):
        return int32([[7] * len(rows)] * self.layers), torch.full((self.layers, len(rows)), float("nan"))

    def copies(self):
        return [tuple(cache.clone() for cache in pair) for pair in self.caches]


def places(shape, rows, g):
    """Up to three rows of each slot, at consecutive positions, in any order; some inactive."""
    found = []
    for slot in torch.randperm(shape.slots, generator=g).tolist():
        count = int(torch.randint(1, 4, (), generator=g))
        start = int(torch.randint(0, shape.max_len - count, (), generator=g))
        found += [(slot, start + i) for i in range(count)]
    chosen = [found[i] for i in torch.randperm(rows, generator=g).tolist()]
    inactive = torch.rand(rows, generator=g) < 0.15
    slots, positions = zip(*chosen, strict=True)
    return int32(slots).masked_fill(inactive, -1), int32(positions)


def check_rows_alone(module, chain):
    """A row's bits are those that it has alone, behind the earlier rows of its slot. True: paths differed."""
    everyone, together, apart = list(range(chain.rows)), chain.copies(), chain.copies()
    hidden, exited, similarities = chain.run(module, everyone, together)
    for row in sorted(everyone, key=lambda row: chain.positions[row]):
        one, one_exited, one_similarities = chain.run(module, [row], apart)
        assert torch.equal(one[0], hidden[row]), f"row {row}: hidden"
        assert torch.equal(one_exited[:, 0], exited[:, row]), f"row {row}: exited"
        assert same_bits(one_similarities[:, 0], similarities[:, row]), f"row {row}: similarities"
    for layer, (caches, expected) in enumerate(zip(together, apart, strict=True)):
        assert all(map(torch.equal, caches, expected)), f"layer {layer}: caches"
    active = chain.slots >= 0
    assert (exited[:, ~active] == 0).all() and similarities[:, ~active].isnan().all()
    return bool((exited[:, active].amin(1) < exited[:, active].amax(1)).any()) if active.any() else False


def check_with_reference(module, chain, together=False):
    """Layer by layer from the same inputs, every buffer that is written."""
    everyone = list(range(chain.rows))
    rule, place = chain._of(everyone)
    exited, similarities = chain.unwritten(everyone)
    previous, hidden, caches = None, chain.hidden, chain.copies()
    for index, (block, own) in enumerate(zip(chain.blocks, caches, strict=True)):
        expected_own = [cache.clone() for cache in own]
        expected_exited, expected_similarities = exited.clone(), similarities.clone()
        rules = index, previous, *rule
        after = block.run_dual(module, (*rules, exited, similarities), hidden, own, *place, together=together)
        expected = block.run_dual(
            reference, (*rules, expected_exited, expected_similarities), hidden, expected_own, *place,
            together=together,
        )  # fmt: skip
        assert_close(after, expected, chain.dtype, f"layer {index}: hidden")
        assert torch.equal(exited, expected_exited), f"layer {index}: exited"
        torch.testing.assert_close(similarities, expected_similarities, equal_nan=True, atol=1e-6, rtol=0)
        for name, cache, wanted in zip("kv", own, expected_own, strict=True):
            assert_close(cache, wanted, chain.dtype, f"layer {index}: {name}_cache")
        previous, hidden = hidden, after


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))
