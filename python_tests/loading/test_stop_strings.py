"""Stop strings, against a search in the whole text."""

import random
import time

import pytest

from river_ext.loading.stop_strings import StopStrings


def first_end(stops, text) -> tuple[int, int] | None:
    """Where the first stop string ends, and the length of the longest that ends there."""
    for end in range(1, len(text) + 1):
        if lengths := [len(stop) for stop in stops if text[:end].endswith(stop)]:
            return end, max(lengths)
    return None


@pytest.mark.parametrize("seed", range(300))
def test_against_a_plain_search(seed):
    rng = random.Random(seed)
    stops = ["".join(rng.choices("ab", k=rng.randrange(1, 7))) for _ in range(rng.randrange(1, 6))]
    text = "".join(rng.choices("abc", [4, 4, 1], k=40))
    automaton, state = StopStrings(stops), 0
    found = first_end(stops, text)
    for end, character in enumerate(text[: found and found[0]], start=1):
        state = automaton.step(state, character)
        ends = [text[max(0, end - n) : end] for n in range(8)]
        held = max(len(e) for e in ends if any(stop.startswith(e) for stop in stops))
        assert automaton.length[state] == held
        assert automaton.match[state] == (found[1] if found and end == found[0] else 0)


def test_thousands_of_strings_cost_no_more_than_one():
    rng = random.Random(0)
    stops = ["".join(rng.choices("abcdefgh", k=12)) for _ in range(4000)]
    automaton = StopStrings(stops)
    states = []
    start, state = time.perf_counter(), 0
    for character in "".join(rng.choices("abcdefgh", k=20_000)):
        state = automaton.step(state, character)
        states.append(state)
    print(f"{1e9 * (time.perf_counter() - start) / 20_000:.0f} ns per character")
    assert time.perf_counter() - start < 2
    assert not StopStrings() and automaton
