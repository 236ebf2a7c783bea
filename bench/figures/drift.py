"""Whether the river drifts away over a long text: agreement with full depth by the place of the token.

Every setting is fed full depth's text. `same` and `kl` are means over the tokens of each stretch of it. A
text that is generated freely is full depth's until the first token that is not the same; `first_difference`
is the place of that one in each text, null where there is none.
"""

from statistics import fmean

from bench.cpu.thresholds import Tally, Text
from bench.lib.figures import BLUE, GREY, ORANGE
from river_ext.model import Model

STRETCH = 32  # tokens
SETTINGS = {
    "full W4": {"mode": "full_w4"},
    "River 0.5": {"threshold": 0.5},
    "River 0.98": {"threshold": 0.98},
}


def measure(model: Model, texts: list[Text]) -> dict:
    lines = []
    for name, options in SETTINGS.items():
        tallies = [tally(model, text, options) for text in texts]
        lines.append(
            {
                "setting": name,
                "same": stretches([found.same for found in tallies]),
                "kl": stretches([found.kl for found in tallies]),
                "first_difference": [first_difference(found.same) for found in tallies],
            }
        )
    return {"stretch": STRETCH, "lengths": [len(text.tokens) for text in texts], "settings": lines}


def tally(model: Model, text: Text, options: dict) -> Tally:
    found = Tally()
    tokens = text.prompt + text.tokens
    found.add(text, model.score(tokens, prompt_length=len(text.prompt), **options))
    return found


def stretches(values: list[list[float]]) -> list[float]:
    """Means over all texts of their tokens from one multiple of STRETCH to the next."""
    longest = max(map(len, values))
    parts = (
        [v for text in values for v in text[start : start + STRETCH]] for start in range(0, longest, STRETCH)
    )
    return [fmean(part) for part in parts]


def first_difference(same: list[bool]) -> int | None:
    return same.index(False) if False in same else None


def draw(axes, result: dict) -> None:
    found = result["drift"]
    for line, color in zip(found["settings"], (ORANGE, BLUE, GREY), strict=True):
        places = [found["stretch"] * (index + 0.5) for index in range(len(line["kl"]))]
        axes.plot(places, line["kl"], "o-", color=color, label=line["setting"])
    highest = max(kl for line in found["settings"] for kl in line["kl"])
    axes.set(xlabel="tokens generated before", ylabel="KL from full depth, nats", ylim=(0, 1.2 * highest))
    axes.legend(frameon=False, ncols=3)
