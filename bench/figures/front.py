"""What speed costs: agreement with full depth against speed, by setting; from what thresholds.py measured."""

from bench.lib.figures import BLUE, ORANGE


def points(result: dict) -> list[tuple[str, float, float]]:
    """(setting, speed over full depth, share of tokens that are the same), fastest last."""
    same = {line["setting"]: line["same"] for line in result["forced"]} | {"full depth": 1.0}
    found = [(line["setting"], line["x_full_depth"], same[line["setting"]]) for line in result["free"]]
    return sorted(found, key=lambda point: point[1])


def draw(axes, result: dict) -> None:
    found = points(result)
    axes.plot([x for _, x, _ in found], [100 * y for *_, y in found], "-", color=BLUE, alpha=0.4)
    for name, x, y in found:
        color = BLUE if name.startswith("River") else ORANGE
        axes.plot(x, 100 * y, "o", color=color)
        axes.annotate(name, (x, 100 * y), xytext=(5, 4), textcoords="offset points")
    axes.set(xlabel="speed over full depth", ylabel="same token as full depth, %")
    axes.margins(x=0.2)
