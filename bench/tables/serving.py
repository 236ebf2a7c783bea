"""Tables of what servers and replicas leave of the engine's speed: TABLES, by the names of their places."""

from statistics import median

from bench.lib.results import result
from bench.tables.layout import markdown, percent


def serve() -> str:
    """What HTTP leaves of the engine's speed."""
    lines = [
        (str(line["at_once"]), percent(line["share"]), ", ".join(map(percent, line["shares"])))
        for line in result("serve")["speed"]
    ]
    return markdown(("requests at once", "of the engine's tokens/s", "in each turn"), lines)


def pace() -> str:
    """Times to the first token."""
    found = result("serve")["pace"]
    long, (first, *later) = found["long_prompt_tokens"], found["turns_ms"]
    named = {
        f"a prompt of {long:,} tokens, alone": found["long_alone_ms"],
        "the same beside the next line's": found["long_beside_ms"],
        f"{found['short_prompt_tokens']} tokens that come meanwhile": found["short_ms"],
        "the first turn of a conversation": first,
        f"its later turns, up to {found['last_prompt_tokens']:,} tokens, the longest": max(later),
    }
    return markdown(("what", "first token after"), [(name, f"{ms:,.0f} ms") for name, ms in named.items()])


def scale_serving() -> str:
    lines = result("scale")["serving"]
    engine = ("engine", f"{lines[0]['engine_requests_per_second']:.1f}", "", "")
    return markdown(
        ("", "requests/s", "x engine", "in each turn"),
        [engine]
        + [
            (
                replicas(line), f"{line['requests_per_second']:.1f}", f"{median(line['shares']):.2f}",
                ", ".join(f"{share:.2f}" for share in line["shares"]),
            )
            for line in lines
        ],
    )  # fmt: skip


def scale_offline() -> str:
    return markdown(
        ("", "lines/s", "in each turn", "start, s"),
        [
            (
                replicas(line), f"{line['lines_per_second']:.1f}",
                ", ".join(f"{speed:.1f}" for speed in line["turns"]), f"{line['start_seconds']:.0f}",
            )
            for line in result("scale")["offline"]
        ],
    )  # fmt: skip


def replicas(line: dict) -> str:
    return "one replica" if line["replicas"] == 1 else f"{line['replicas']} replicas"


TABLES = {
    "serve": serve,
    "serve-pace": pace,
    "scale-serving": scale_serving,
    "scale-offline": scale_offline,
}
