"""Greedy, temperature, top-k, top-p and min-p."""

import math
from dataclasses import replace

import pytest
import torch
from drawing import drawing
from tiny_model import MULTIPLIERS, random_model, random_prompt

from river_ext import ops
from river_ext.engine import sampling
from river_ext.engine.sampling import Drawing, Sampling
from river_ext.reference import gumbel

DRAWS = 1200
LOGITS = torch.tensor([1.0, 0.2, -0.5, 1.3, -2.0, 0.9])


def draw(logits, temperature=1.0, draws=DRAWS, **options):
    """So many tokens from logits [vocab_size], by seeds and positions of their own."""
    rows, drawn = torch.as_tensor(logits).expand(8, -1).contiguous(), []
    for position in range(0, draws, 8):
        arguments = drawing(rows, temperature, seeds=range(8), positions=position, **options)
        drawn.append(ops.sample(**arguments)[0])
    return torch.cat(drawn)


def next_tokens(network, hidden, options, seeds, positions, return_logits=False):
    """`sampling.draw` for rows that differ in their seeds."""
    drawing = Drawing.greedy(positions)
    drawing.fill([replace(options, seed=seed) for seed in seeds.tolist()])
    return sampling.draw(network, hidden, drawing, options.filters, return_logits)[:2]


def kept(logits, temperature, **options):
    return draw(logits, temperature, **options).unique().tolist()


def test_top_k_keeps_the_likeliest():
    assert kept(LOGITS, temperature=1.0, top_k=2) == [0, 3]
    assert kept(LOGITS, temperature=1.0, top_k=100) == list(range(6))
    assert kept([1.0, 2.0, 2.0, 2.0], temperature=1.0, top_k=2) == [1, 2], "ties go to the lowest id"


def test_top_p_keeps_the_fewest_that_reach_p():
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    assert kept(logits, temperature=1.0, top_p=0.39) == [1]
    assert kept(logits, temperature=1.0, top_p=0.5) == [1, 2]
    assert kept(logits, temperature=1.0, top_p=0.85) == [1, 2, 3]
    assert kept(logits, temperature=1.0, top_p=1e-9) == [1]
    assert kept(logits, temperature=0.2, top_p=0.5) == [1], "of the distribution at this temperature"


def test_top_p_looks_at_what_top_k_left():
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    assert kept(logits, temperature=1.0, top_k=2, top_p=0.58) == [1, 2]
    assert kept(logits, temperature=1.0, top_k=2, top_p=0.57) == [1]


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest():
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    assert kept(logits, temperature=1.0, min_p=0.24) == [0, 1, 2, 3]
    assert kept(logits, temperature=1.0, min_p=0.26) == [1, 2, 3]
    assert kept(logits, temperature=1.0, min_p=0.6) == [1, 2]
    assert kept(logits, temperature=0.2, min_p=0.26) == [1], "of the distribution at this temperature"
    assert kept([1.0, 2.0, 2.0, 0.0], temperature=1.0, min_p=1.0) == [1, 2], "ties stay"


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}, {"temperature": 1.0, "top_p": 0.9},
     {"temperature": 1.0, "min_p": 0.1}],
)  # fmt: skip
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_without_finite_logits_has_no_token(value, options):
    network = random_model().network
    hidden = network.embed(torch.arange(8) + 20)
    seeds, positions = torch.arange(8), torch.full((8,), 3, dtype=torch.int32)
    expected, _ = next_tokens(network, hidden, Sampling(**options), seeds, positions)
    hidden[[1, 6], 5] = value
    expected[[1, 6]] = -1
    for return_logits in (False, True):
        tokens, logits = next_tokens(network, hidden, Sampling(**options), seeds, positions, return_logits)
        assert torch.equal(tokens, expected)
        assert len(logits) == (8 if return_logits or Sampling(**options).filters else 0)


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return ((counts - expected).square() / expected)[probabilities > 0].sum().item()


# 99.9 % points of the chi-square distribution
LIMIT = {2: 13.8, 5: 20.5}


@pytest.mark.parametrize(
    ("options", "left"), [({}, [0, 1, 2, 3, 4, 5]), ({"top_k": 3}, [0, 3, 5]), ({"top_p": 0.8}, [0, 3, 5]),
                          ({"top_k": 4, "top_p": 0.8}, [0, 3, 5]), ({"min_p": 0.5}, [0, 3, 5])]
)  # fmt: skip
def test_draws_follow_the_filtered_distribution(options, left):
    probabilities = torch.zeros(6)
    probabilities[left] = torch.softmax(LOGITS[left] / 0.8, dim=0)
    counts = draw(LOGITS, 0.8, **options).bincount(minlength=6).float()
    assert counts.nonzero().flatten().tolist() == left
    assert chi_square(counts, probabilities) < LIMIT[len(left) - 1]


def test_the_head_draws_what_sample_draws_from_its_logits():
    """Bit for bit, also where logits are divided; a filter that keeps all tokens tells the two apart."""
    network = random_model(**MULTIPLIERS).network
    hidden, seeds = network.embed(torch.arange(8) + 20), torch.arange(8)
    for start in range(0, 400, 8):
        positions = torch.arange(start, start + 8, dtype=torch.int32)
        by_head, _ = next_tokens(network, hidden, Sampling(2.5), seeds, positions)
        by_sample, _ = next_tokens(
            network, hidden, Sampling(2.5, top_k=len(network.lm_head)), seeds, positions
        )
        assert torch.equal(by_head, by_sample)


def test_plain_temperature_in_the_op_follows_the_distribution():
    network = random_model(vocab_size=6).network
    hidden = network.embed(torch.tensor([2])).expand(8, -1).contiguous()
    _, logits = next_tokens(network, hidden, Sampling(), torch.zeros(8).long(), torch.zeros(8).int(), True)
    counts = torch.zeros(6)
    for start in range(0, DRAWS, 8):
        positions = torch.arange(start, start + 8, dtype=torch.int32)
        tokens, _ = next_tokens(network, hidden, Sampling(1.7), torch.full((8,), 3), positions)
        counts += tokens.bincount(minlength=6)
    assert chi_square(counts, torch.softmax(logits[0] / 1.7, dim=0)) < LIMIT[5]


def test_filters_and_op_draw_the_same_tokens():
    """A filter that rules nothing out changes nothing: the noise is the same."""
    network = random_model().network
    hidden = network.embed(torch.arange(8) + 20)
    for position in range(40):
        seeds, positions = torch.arange(8) + 100, torch.full((8,), position, dtype=torch.int32)
        plain, _ = next_tokens(network, hidden, Sampling(1.2), seeds, positions)
        for nothing in ({"top_k": 80}, {"min_p": 1e-30}):
            filters, _ = next_tokens(network, hidden, Sampling(1.2, **nothing), seeds, positions)
            assert torch.equal(plain, filters)


def test_rows_draw_by_their_own_options():
    """Greedy rows beside sampled ones, with filters and without."""
    network = random_model().network
    hidden = network.embed(torch.arange(8) + 20)
    options = [
        Sampling(), Sampling(1.2, seed=3), Sampling(0.9, top_k=5, seed=4), Sampling(1, top_p=0.7, seed=-5),
        Sampling(2.0, min_p=0.2, seed=6), Sampling(0.0, top_k=1, seed=7), Sampling(1.2, seed=3), Sampling(3),
    ]  # fmt: skip
    for position in range(20):
        positions = torch.arange(8, dtype=torch.int32) + position
        drawing = Drawing.greedy(positions)
        drawing.fill(options)
        tokens, logits, _ = sampling.draw(network, hidden, drawing, filters=True)
        for row, mine in enumerate(options):
            seed, place = torch.tensor([mine.seed]), positions[row : row + 1].clone()
            alone, own = next_tokens(network, hidden[row : row + 1], mine, seed, place, return_logits=True)
            assert tokens[row] == alone and torch.equal(logits[row], own[0])
    drawing.fill([Sampling(0.5, 9, 0.8, 0.1, 11)])  # another request in the first row; the others stay
    assert [float(t[0]) for t in (drawing.temperature, drawing.top_k, drawing.seeds)] == [0.5, 9, 11]
    assert drawing.seeds.tolist()[1:] == [mine.seed for mine in options[1:]]


def test_noise_depends_on_seed_position_and_token():
    tokens = torch.arange(16)
    base = gumbel(1, 2, tokens)
    assert torch.equal(base, gumbel(1, 2, tokens))
    assert torch.equal(base[[3, 9]], gumbel(1, 2, tokens[[3, 9]]))
    for other in (gumbel(3, 2, tokens), gumbel(1, 3, tokens), gumbel(1, 2, tokens + 16)):
        assert not torch.equal(base, other)


def test_greedy_is_the_argmax_with_ties_to_the_lowest_id():
    network = random_model().network
    out = random_model().generate(random_prompt(4), max_new_tokens=10, return_logits=True)
    assert out.tokens == out.logits.argmax(-1).tolist()
    hidden = torch.zeros(1, network.config.hidden_size)  # all logits are 0
    tokens, logits = next_tokens(
        network, hidden, Sampling(), torch.zeros(1).long(), torch.zeros(1).int(), True
    )
    assert tokens.tolist() == [0]
    assert (logits == 0).all()


def test_zero_temperature_ignores_the_filters():
    greedy = random_model().generate(random_prompt(4), max_new_tokens=10)
    filters = random_model().generate(random_prompt(4), max_new_tokens=10, top_k=3, top_p=0.5, min_p=0.3)
    assert filters.tokens == greedy.tokens


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_a_filter_that_leaves_one_token_is_greedy(options):
    greedy = random_model().generate(random_prompt(4), max_new_tokens=10)
    drawn = random_model().generate(random_prompt(4), max_new_tokens=10, temperature=1.0, **options)
    assert drawn.tokens == greedy.tokens


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1}])
@pytest.mark.parametrize("exits", [{"mode": "full"}, {"threshold": 0.7}], ids=str)
def test_same_seed_and_prompt_give_the_same_tokens_in_any_batch(options, exits):
    options = {"max_new_tokens": 12, "temperature": 1.0, **exits, **options}
    prompt, seeds = random_prompt(5), [5, 6, 5, -1]
    alone = [random_model().generate(prompt, seed=seed, **options).tokens for seed in seeds]
    assert alone[0] == alone[2]
    assert len({tuple(tokens) for tokens in alone}) == 3
    prompts = [prompt, prompt, prompt, prompt, random_prompt(9, 9)]
    together = random_model().generate(prompts, seed=[*seeds, 0], **options)
    assert [out.tokens for out in together[:4]] == alone
    one_seed = random_model().generate(prompts[:3], seed=5, **options)
    assert [out.tokens for out in one_seed] == [alone[0]] * 3


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"min_p": 0.05}])
def test_noise_belongs_to_the_position_of_the_token_drawn(options):
    """Prefill and every step: the token at position p is drawn with the noise of p."""
    prompt = random_prompt(5)
    out = random_model().generate(
        prompt, max_new_tokens=12, temperature=0.9, seed=11, threshold=0.8, return_logits=True, **options
    )
    drawn = [
        ops.sample(**drawing(logits[None], 0.9, seeds=11, positions=len(prompt) + i, **options))[0].item()
        for i, logits in enumerate(out.logits)
    ]
    assert out.tokens == drawn


def test_logits_are_those_before_the_filter():
    options = {"max_new_tokens": 3, "return_logits": True, "temperature": 1.0}
    plain = random_model().generate(random_prompt(4), **options)
    filters = random_model().generate(random_prompt(4), top_k=2, **options)
    assert torch.equal(plain.logits[0], filters.logits[0])
    assert filters.logits.isfinite().all()
