"""Figures as SVG: how they look, and which results they show.

A figure carries the digest of its results, so that a test can tell, without drawing it, that it is theirs.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

BLUE, ORANGE, GREY = "#2f6db5", "#b35900", "#57606a"


def pyplot():
    """matplotlib's, in our style; without matplotlib the script ends with one line."""
    try:
        import matplotlib
    except ImportError:
        print(
            f"{Path(sys.argv[0]).stem}.py: figures need matplotlib; accepted: to install it", file=sys.stderr
        )
        raise SystemExit(2) from None
    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "river", "font.size": 9, "xtick.labelsize": 8}
    )
    from matplotlib import pyplot

    return pyplot


def save(figure, path: Path, sources: Sequence[Path]) -> None:
    figure.savefig(path, metadata={"Date": None, "Creator": None, "Description": digest(sources)})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def is_of(path: Path, sources: Sequence[Path]) -> bool:
    """Whether a figure shows these results as they are now."""
    return path.exists() and digest(sources) in path.read_text()


def digest(sources: Sequence[Path]) -> str:
    return "results " + hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
