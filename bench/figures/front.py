"""What speed costs: agreement with full depth against speed, by setting; from what thresholds.py measured."""

from itertools import cycle

from bench.lib.figures import BLUE, ORANGE

# neighbours have their names at different sides of the point: below, to the right, to the left
NAMES_AT = (("center", (0, -14)), ("left", (6, 2)), ("right", (-6, 2)))


def points(result: dict) -> list[tuple[str, float, float]]:
    """(setting, speed over full depth, share of tokens that are the same), fastest last."""
    same = {line["setting"]: line["same"] for line in result["forced"]} | {"full depth": 1.0}
    found = [(line["setting"], line["x_full_depth"], same[line["setting"]]) for line in result["free"]]
    return sorted(found, key=lambda point: point[1])


def draw(axes, result: dict) -> None:
    found = points(result)
    axes.plot([x for _, x, _ in found], [100 * y for *_, y in found], "-", color=BLUE, alpha=0.4)
    for (name, x, y), (side, offset) in zip(found, cycle(NAMES_AT), strict=False):
        color = BLUE if name.startswith("River") else ORANGE
        axes.plot(x, 100 * y, "o", color=color)
        axes.annotate(name, (x, 100 * y), xytext=offset, textcoords="offset points", ha=side)
    axes.set(xlabel="speed over full depth", ylabel="same token as full depth, %")
    axes.margins(x=0.2)
