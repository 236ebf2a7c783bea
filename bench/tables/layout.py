"""How the tables of the documents look: columns of text in a fence, or Markdown."""

from collections.abc import Iterable, Sequence

Rows = Iterable[Sequence[str]]


def block(head: Sequence[str], rows: Rows) -> str:
    """Columns of text in a fence: names to the left, numbers to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in cells).rstrip()
        for cells in (list(enumerate(zip(line, widths, strict=True))) for line in lines)
    ]
    return fenced("\n".join(texts))


def fenced(text: str) -> str:
    return f"```\n{text}\n```"


def markdown(head: Sequence[str], rows: Rows, names: int = 1) -> str:
    """The first `names` columns to the left."""
    lines = [row(head), "|" + "---|" * names + "---:|" * (len(head) - names), *map(row, rows)]
    return "\n".join(lines)


def row(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"
