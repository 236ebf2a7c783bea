"""Random hostile input, reproducible by its number: `python -m fuzz --help`, in python_tests/.

An area is a module here with `prepare(folder)`, which makes what its inputs start from, and with
`attempt(state, random)`, which makes one input, tries it, and returns REFUSED or ACCEPTED. Whatever it raises
is a finding, and so are a dead process and one that takes too long.
"""

AREAS = (
    "configs", "checkpoints", "rivers", "imports", "saves", "tokenizer_files", "requests", "commands",
    "op_calls",
)  # fmt: skip
REFUSED, ACCEPTED = "refused", "accepted"


class Finding(Exception):
    """An input was neither refused in one line nor dealt with as it should have been."""


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise Finding(message)


def expect_one_line(error: BaseException, limit: int = 2000) -> None:
    """What a refusal must look like."""
    text = str(error)
    expect(text.strip() == text and text and "\n" not in text, f"an error of several lines: {text[:300]!r}")
    expect(len(text) <= limit, f"an error of {len(text)} characters: {text[:300]!r}")
