"""Tables of what a model takes of memory, measured and counted: TABLES, by the names of their places."""

from bench import memory
from bench.lib.results import result
from bench.tables.layout import fenced, markdown


def memory_measured() -> str:
    found: dict[str, list[str]] = {}
    for line in result("memory")["memory"]:
        found.setdefault(line["stage"], []).extend((f"{line['anonymous']:.0f}", f"{line['file']:.0f}"))
    head = ("MiB", "whole: anonymous", "of files", "4 layers resident: anonymous", "of files")
    return markdown(head, [(stage, *cells) for stage, cells in found.items()])


def memory_of(name: str) -> str:
    return fenced(memory.table(memory.SHAPES[name], memory.RESIDENT))


def memory_as_the_paper() -> str:
    return fenced(memory.text_of(memory.as_the_paper_counts(memory.SHAPES["Llama-3.1-8B"])))


TABLES = {
    "memory-measured": memory_measured,
    "memory-8B": lambda: memory_of("Llama-3.1-8B"),
    "memory-1B": lambda: memory_of("Llama-3.2-1B"),
    "memory-paper": memory_as_the_paper,
}
