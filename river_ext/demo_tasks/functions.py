"""Short Python functions: signature and docstring are the prompt, the body is the completion."""

import random
import re
from dataclasses import dataclass

from .interpreter import run_function


@dataclass(frozen=True)
class Function:
    """A function: `prompt` is signature and docstring, `completion` the body, `tests` tuples of arguments."""

    prompt: str
    completion: str
    entry_point: str
    tests: tuple
    key: str


PHRASES = [
    ("{v} plus {a}", "{v} + {a}"), ("{v} minus {a}", "{v} - {a}"), ("{v} times {a}", "{v} * {a}"),
    ("{a} minus {v}", "{a} - {v}"), ("the remainder of {v} divided by {a}", "{v} % {a}"),
    ("the quotient of {v} and {a}", "{v} // {a}"), ("the square of {v} plus {a}", "{v} * {v} + {a}"),
    ("the absolute value of {v} minus {a}", "abs({v}) - {a}"),
]  # fmt: skip
TESTS = [("greater than", ">"), ("less than", "<"), ("at least", ">="), ("at most", "<="), ("equal to", "==")]

# (name, arguments, docstring, body). x, y: numbers; l: a list; s: a string; P, Q, R: code of a phrase in x, y
# or the loop variable v, with p, q, r its words; C: a comparison, with c its words; a < b: numbers.
FUNCTIONS = [
    ("value", "x", "Return {p}.", "return {P}"),
    ("larger", "xy", "Return the larger of {p} and {q}.", "return max({P}, {Q})"),
    ("smaller", "xy", "Return the smaller of {p} and {q}.", "return min({P}, {Q})"),
    ("total", "xy", "Return the sum of {p} and {q}.", "return ({P}) + ({Q})"),
    ("difference", "xy", "Return the difference of {p} and {q}.", "return ({P}) - ({Q})"),
    ("product", "xy", "Return the product of {p} and {q}.", "return ({P}) * ({Q})"),
    ("is_so", "x", "Return True if {p} is {c} {b}.", "return {P} {C} {b}"),
    ("is_between", "x", "Return True if {x} is between {a} and {b}.", "return {a} <= {x} <= {b}"),
    (
        "check",
        "xy",
        "Return True if {x} is {c} {a} and {y} is divisible by {b}.",
        "return {x} {C} {a} and {y} % {b} == 0",
    ),
    ("either", "xy", "Return True if {x} is {c} {a} or {y} is {c} {b}.", "return {x} {C} {a} or {y} {C} {b}"),
    (
        "choose",
        "xy",
        "If {x} is {c} {b} return {p}, otherwise return {q}.",
        "if {x} {C} {b}:\n        return {P}\n    return {Q}",
    ),
    (
        "grade",
        "x",
        "Return 'high' if {p} is {c} {b}, otherwise 'low'.",
        "return 'high' if {P} {C} {b} else 'low'",
    ),
    ("clamp", "x", "Limit {x} to the range from {a} to {b}.", "return max({a}, min({x}, {b}))"),
    ("sum_of", "l", "Return the sum of {r} for each v in {l}.", "return sum({R} for v in {l})"),
    ("map_to", "l", "Return the list of {r} for each v in {l}.", "return [{R} for v in {l}]"),
    ("keep", "l", "Return the items of {l} that are {c} {a}.", "return [v for v in {l} if v {C} {a}]"),
    ("count", "l", "Count the items of {l} that are {c} {a}.", "return len([v for v in {l} if v {C} {a}])"),
    (
        "map_some",
        "l",
        "Return the list of {r} for each v in {l} that is {c} {b}.",
        "return [{R} for v in {l} if v {C} {b}]",
    ),
    (
        "loop_sum",
        "l",
        "Start with {b} and add {r} for each v in {l}.",
        "total = {b}\n    for v in {l}:\n        total += {R}\n    return total",
    ),
    (
        "loop_some",
        "l",
        "Add {r} for each v in {l} that is {c} {b}.",
        "total = 0\n    for v in {l}:\n        if v {C} {b}:\n            total += {R}\n    return total",
    ),
    (
        "range_sum",
        "x",
        "Return the sum of {r} for v from {a} up to {x}.",
        "return sum({R} for v in range({a}, {x}))",
    ),
    ("last", "l", "Return the last item of {l} plus {a}.", "return {l}[-1] + {a}"),
    ("scale", "l", "Return the largest item of {l} times {a}.", "return max({l}) * {a}"),
    ("size", "s", "Return the length of {s} plus {a}.", "return len({s}) + {a}"),
    ("shout", "s", "Return {s} in upper case, {a} times.", "return {s}.upper() * {a}"),
    (
        "then",
        "xy",
        "Add {p} and {y}, then take the remainder by {b}.",
        "total = {P} + {y}\n    return total % {b}",
    ),
]
VARIABLES = {"x": ("x", "n", "k", "num"), "y": ("y", "m", "z", "other"), "l": ("values", "items", "data"),
             "s": ("text", "word", "name")}  # fmt: skip


def _phrase(rng, variable):
    """(words, code) of a random expression in `variable`."""
    words, code = rng.choice(PHRASES)
    a = rng.randint(2, 99)
    return words.format(v=variable, a=a), code.format(v=variable, a=a)


def _arguments(kind, constants):
    """Test values for one argument: around the constants of the function, and some others."""
    numbers = sorted({-200, -7, 0, 1, 5, 64, 150, 2500, *(c + i for c in constants for i in (-1, 0, 1))})
    if kind == "l":
        return [numbers, [3, -2, 41, 17], [constants[0]], [90, 12, 55]]
    return ["ab", "River", "x y"] if kind == "s" else numbers


def function(rng: random.Random) -> Function:
    """One short function with a docstring."""
    number = rng.randrange(len(FUNCTIONS))
    name, kinds, doc, body = FUNCTIONS[number]
    v = {kind: rng.choice(choices) for kind, choices in VARIABLES.items()}
    v["a"], v["b"] = sorted(rng.sample(range(2, 100), 2))
    v["c"], v["C"] = rng.choice(TESTS)
    for words, code, variable in (("p", "P", v["x"]), ("q", "Q", v["y"]), ("r", "R", "v")):
        v[words], v[code] = _phrase(rng, variable)
    doc, body = doc.format(**v), "\n    " + body.format(**v)
    prompt = f'def {name}({", ".join(v[k] for k in kinds)}):\n    """{doc}"""'
    constants = [int(c) for c in re.findall(r"\d+", doc)]
    columns = [_arguments(kind, constants) for kind in kinds]
    rows = range(max(map(len, columns)))
    tests = tuple(tuple(c[(i * (1 + 2 * j) + j) % len(c)] for j, c in enumerate(columns)) for i in rows)
    key = f"f{number}:{v['c'] if '{c}' in FUNCTIONS[number][2] else ''}:" + ",".join(map(str, constants))
    return Function(prompt, body, name, tests, key)


def score_function(text: str, item: Function) -> bool:
    """True if the body written after the prompt gives the result of the reference body for every test."""
    try:
        for arguments in item.tests:
            expected = run_function(item.prompt + item.completion, item.entry_point, arguments)
            result = run_function(item.prompt + text, item.entry_point, arguments)
            if type(result) is not type(expected) or result != expected:
                return False
        return True
    except Exception:  # whatever went wrong: what the model wrote does not run
        return False
