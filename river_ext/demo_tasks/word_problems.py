"""Arithmetic word problems of several steps with worked answers."""

import operator
import random
import re
from dataclasses import dataclass

LIMIT = 500  # the largest number


@dataclass(frozen=True)
class Problem:
    """A word problem: `prompt` ends at ``Answer:``, `completion` holds worked steps and ``#### answer``."""

    prompt: str
    completion: str
    answer: int
    key: str


NAMES = (
    "Ana",
    "Ben",
    "Cara",
    "Dev",
    "Eli",
    "Fay",
    "Gus",
    "Hana",
    "Ivan",
    "Jo",
    "Kim",
    "Leo",
    "Mia",
    "Nia",
    "Omar",
    "Pia",
    "Quin",
    "Rosa",
    "Sam",
    "Tom",
    "Uma",
    "Vic",
    "Wes",
    "Yara",
)
THINGS = (
    "apples",
    "books",
    "coins",
    "stamps",
    "shells",
    "cards",
    "pens",
    "marbles",
    "cakes",
    "flowers",
    "eggs",
    "stones",
)
PLACES = ("shop", "market", "farm", "school", "park", "fair")
ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}

# (text, hidden definitions, steps). A, B: three digits; a, b, c: two; d, e, f: one; other letters are
# defined by a hidden definition or by an earlier step.
# fmt: off
TEMPLATES = [
    ("{n} has {A} {t}. {m} gives {n} {d} bags of {a} {t}. How many {t} does {n} have now?",
     "", "p=d*a q=A+p"),
    ("{n} had {A} {t}, lost {a} at the {p}, gave {b} to {m} and then bought {c} more. How many {t} does "
     "{n} have?",
     "", "p=A-a q=p-b r=q+c"),
    ("{m} has {d} times as many {t} as {n}. {n} has {a} {t}. How many do they have together?",
     "", "p=d*a q=p+a"),
    ("At the {p} {t} cost {d} dollars each. {n} buys {a} and pays with {A} dollars. How much change does "
     "{n} get?",
     "", "p=d*a q=A-p"),
    ("{n} finds {A} {t} on Monday, {B} on Tuesday and {a} on Sunday, and gives {b} to {m}. How many {t} "
     "are left?",
     "", "p=A+B q=p+a r=q-b"),
    ("{n} shares {P} {t} equally among {d} friends. {m} is one of them and already has {A}. How many {t} "
     "does {m} have now?",
     "P=d*a", "p=P/d q=A+p"),
    ("{n} packs {P} {t} in boxes of {d}, sells {b} boxes and then buys {c} boxes. How many boxes does {n} "
     "have?",
     "P=d*a", "p=P/d q=p-b r=q+c"),
    ("{n} fills {d} boxes with {a} {t} each and {e} bags with {b} {t} each. How many {t} is that?",
     "", "p=d*a q=e*b r=p+q"),
    ("{n} fills {d} boxes with {a} {t} each and {e} bags with {b} {t} each, but {c} {t} are broken. How "
     "many {t} are good?",
     "", "p=d*a q=e*b r=p+q s=r-c"),
    ("A book has {A} pages. {n} reads {a} pages a day for {d} days. How many pages are left?",
     "", "p=d*a q=A-p"),
    ("A book has {A} pages. {n} reads {a} pages a day for {d} days and then {b} pages a day for {e} days. "
     "How many pages are left?",
     "", "p=d*a q=A-p r=e*b s=q-r"),
    ("{n} earns {a} dollars an hour and works {d} hours on Monday and {e} hours on Friday. Then {n} spends"
     " {b} dollars at the {p}. How many dollars are left?",
     "", "p=d+e q=p*a r=q-b"),
    ("A train carries {A} people. At the first stop {a} get off and {b} get on, at the second stop {c} get"
     " off. How many people are on the train?",
     "", "p=A-a q=p+b r=q-c"),
    ("{n} has {A} dollars and buys {d} {t} for {a} dollars each and a bag for {b} dollars. How many "
     "dollars are left?",
     "", "p=d*a q=A-p r=q-b"),
    ("Tickets at the {p} cost {a} dollars for adults and {d} dollars for children. {n} buys {e} adult "
     "tickets and {b} child tickets. How many dollars is that?",
     "", "p=e*a q=b*d r=p+q"),
    ("{n} has {A} {t}, which is {a} more than {m} has. How many {t} do they have together?",
     "", "p=A-a q=A+p"),
    ("{n} has {A} {t} and {m} has {a} more than {n}. How many {t} do they have together?",
     "", "p=A+a q=A+p"),
    ("A farm has {d} fields with {a} trees each. {b} trees fall in a storm and {e} rows of {f} trees are "
     "planted. How many trees does the farm have?",
     "", "p=d*a q=p-b r=e*f s=q+r"),
    ("{n} saves {d} dollars a week for {a} weeks, spends {b} dollars and gets {c} dollars from {m}. How "
     "many dollars does {n} have?",
     "", "p=d*a q=p-b r=q+c"),
    ("{n} puts {P} {t} in {d} equal rows. {m} takes {e} rows. How many {t} are left?",
     "P=d*a", "p=P/d q=e*p r=P-q"),
    ("{n} has {b} {t}, buys {S} more at the {p} and shares all of them equally among {d} friends. How many"
     " {t} does each get?",
     "P=d*a S=P-b", "p=b+S q=p/d"),
    ("{n} scores {a}, {b} and {S} points in three games. What is the average?",
     "P=3*c Q=P-a S=Q-b", "p=a+b q=p+S r=q/3"),
    ("A tank holds {A} litres. It loses {d} litres an hour for {a} hours, and then {n} adds {b} litres. "
     "How many litres are in the tank?",
     "", "p=d*a q=A-p r=q+b"),
    ("{n} has {a} {t}. {m} has {d} times as many and Zoe has {b} more than {m}. How many {t} do all three "
     "have?",
     "", "p=d*a q=p+b r=a+p s=r+q"),
    ("{n} is {a} years old and has {A} {t}. {n} gives {b} {t} to each of {d} friends. How many {t} are "
     "left?",
     "", "p=d*b q=A-p"),
    ("A shop has {A} {t}. It sells {a} in the morning and {d} times as many in the afternoon. How many {t}"
     " are left?",
     "", "p=d*a q=p+a r=A-q"),
]

EVENTS = [
    ("{n} finds {a} {t}.", "+a"), ("{n} gives {a} {t} to {m}.", "-a"),
    ("{n} loses {a} {t} at the {p}.", "-a"), ("{m} brings {A} {t}.", "+A"),
    ("{n} sells {A} {t}.", "-A"), ("{n} buys {d} bags of {a} {t}.", "+d*a"),
    ("{n} gives {d} {t} to each of {e} friends.", "-d*e"),
]
# fmt: on


def _numbers(rng):
    """One random value for each letter of the templates."""
    ranges = {
        "A": (100, 400),
        "B": (100, 250),
        **dict.fromkeys("abc", (11, 50)),
        **dict.fromkeys("def", (2, 8)),
    }
    return {letter: rng.randint(*r) for letter, r in ranges.items()}


def _apply(x, op, y):
    """The value of `x op y`, or None where the step would be too hard, inexact or outside 1..LIMIT."""
    if op == "*" and (min(x, y) > 9 or max(x, y) > 99):
        return None
    if op == "/" and (y == 0 or x % y):
        return None
    value = ARITHMETIC[op](x, y)
    return value if 0 < value <= LIMIT else None


def _solve(values, steps, lines=None):
    """Add the results of steps such as ``p=d*a`` to `values`, worked lines to `lines`; False if one fails."""
    for step in steps.split():
        name, x, op, y = re.fullmatch(r"(\w)=(\w)(\W)(\w)", step).groups()
        x, y = (values[v] if v in values else int(v) for v in (x, y))
        result = _apply(x, op, y)
        if result is None:
            return False
        values[name] = result
        if lines is not None:
            lines.append(f"{x} {op} {y} = {result}.")
    return True


def _from_template(rng, words):
    """(text, worked lines, key) of one filled template."""
    number = rng.randrange(len(TEMPLATES))
    text, hidden, steps = TEMPLATES[number]
    while True:
        values, lines = _numbers(rng), []
        if _solve(values, hidden) and _solve(values, steps, lines):
            return text.format(**{**values, **words}), lines, f"t{number}"


def _story(rng, words):
    """(text, worked lines, key) of a chain of two to four events after a first amount."""
    while True:
        start = total = rng.randint(20, 300)
        sentences, lines, key = [f"{words['n']} has {start} {words['t']}."], [], "story"
        for _ in range(rng.randint(2, 4)):
            (text, change), v = rng.choice(EVENTS), _numbers(rng)
            amount = v[change[1]]
            if len(change) == 4:
                amount *= v[change[3]]
                lines.append(f"{v[change[1]]} * {v[change[3]]} = {amount}.")
            result = _apply(total, change[0], amount)
            if result is None:
                break
            lines.append(f"{total} {change[0]} {amount} = {result}.")
            total = result
            sentences.append(text.format(**{**v, **words}))
            key += change[0]
        else:
            sentences.append("How many {t} does {n} have now?".format(**words))
            return " ".join(sentences), lines, key


def problem(rng: random.Random) -> Problem:
    """One word problem of two to eight worked steps."""
    n, m = rng.sample(NAMES, 2)
    words = {"n": n, "m": m, "t": rng.choice(THINGS), "p": rng.choice(PLACES)}
    text, lines, key = (_story if rng.random() < 0.2 else _from_template)(rng, words)
    answer = int(lines[-1].split()[-1].rstrip("."))
    key += ":" + ",".join(re.findall(r"\d+", text))
    return Problem(f"Question: {text}\nAnswer:", f" {' '.join(lines)} #### {answer}", answer, key)


def score_problem(text: str, item: Problem) -> bool:
    """True if the text written after the prompt gives the right number after ``####``."""
    found = re.search(r"####\s*(-?\d+)", text)
    return bool(found) and int(found.group(1)) == item.answer
