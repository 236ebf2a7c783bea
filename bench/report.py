"""The tables, numbers and figures of the documents, from the JSON in bench/results: none of it is typed.

A table stands in a document between lines with `<!--report:NAME-->` and `<!--end-->`, where NAME is one of
TABLES; a number in a sentence stands between the same, where NAME is one of VALUES.

    python -m bench.report            writes all of them anew, and the figures whose numbers have changed
    python -m bench.report --check    names what is not up to date, and then ends with 1; writes nothing

Nothing is written before all of it is there.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.cpu import thresholds
from bench.figures import paper
from bench.lib import figures
from bench.lib.common import RESULTS
from bench.lib.places import Place, places
from bench.lib.prose import VALUES
from bench.lib.results import FILES
from bench.tables import quality, serving, sizes, speed
from river_ext.errors import RiverError

ROOT = RESULTS.parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLES: dict[str, Callable[[], str]] = speed.TABLES | serving.TABLES | quality.TABLES | sizes.TABLES
PAPER = [RESULTS / FILES["paper"], RESULTS / FILES["thresholds"]]
# path: the results that it shows, and what draws it
FIGURES: dict[Path, tuple[list[Path], Callable]] = {
    ROOT / "docs" / "thresholds.svg": (PAPER[1:], thresholds.plot),
}
FIGURES |= {
    ROOT / "docs" / "paper" / f"{name}.svg": (PAPER, partial(paper.plot, name)) for name in paper.DRAWN
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--check", action="store_true", help="write nothing")
    args = p.parse_args()
    try:
        texts = {path: rendered(path) for path in DOCUMENTS}
    except RiverError as error:
        sys.exit(f"report.py: {error}")
    texts = {path: text for path, text in texts.items() if text != path.read_text()}
    stale_figures = [path for path, (sources, _) in FIGURES.items() if not figures.is_of(path, sources)]
    for path in (*texts, *stale_figures):
        print(path.relative_to(ROOT))
    if args.check:
        sys.exit(bool(texts or stale_figures))
    texts |= {path: drawn(path) for path in stale_figures}
    for path, text in texts.items():
        path.write_text(text)


def rendered(document: Path) -> str:
    """The document with its tables and numbers as the results have them."""
    text, parts, end = document.read_text(), [], 0
    for place in places(text, str(document.relative_to(ROOT))):
        parts += text[end : place.start], shown(place)
        end = place.stop
    return "".join(parts) + text[end:]


def shown(place: Place) -> str:
    """What stands at a place; RiverError says what stands in the way."""
    name, where = place.name, f"{place.where}: {place.name!r}"
    try:
        if name in TABLES:
            return f"\n{TABLES[name]()}\n"
        if name in VALUES:
            return VALUES[name]()
    except KeyError as error:
        raise RiverError(f"{where} needs {error}, which its results do not have") from None
    except (OSError, ValueError) as error:
        raise RiverError(f"{where}: {error}") from None
    raise RiverError(f"{where}; accepted: {', '.join([*TABLES, *VALUES])}")


def drawn(figure: Path) -> str:
    """The SVG of a figure as the results have it."""
    sources, draw = FIGURES[figure]
    with TemporaryDirectory() as folder:
        scratch = Path(folder) / figure.name
        draw(*sources, scratch)
        return scratch.read_text()


if __name__ == "__main__":
    main()
