"""Drafts for nothing: how a text went on where its last tokens stood before (prompt lookup)."""

from collections.abc import Sequence


class Quotes:
    """A request's prompt and new tokens, a list that grows, and where in them to look for what follows.

    Nothing is read before the first look: a request that waits for a slot takes no memory for it.
    """

    SAME = 3  # tokens in a row that must stand there, too

    def __init__(self, prompt: Sequence[int], new_tokens: Sequence[int]):
        self._prompt, self._new_tokens = prompt, new_tokens
        self._text: list[int] = []  # what has been read of both
        self._next: dict[tuple[int, ...], int] = {}  # the place of what last came after such tokens

    def _read(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if len(self._text) >= self.SAME:
                self._next[tuple(self._text[-self.SAME :])] = len(self._text)
            self._text.append(token)

    def find(self, drafts: Sequence[int], count: int) -> list[int]:
        """What may follow all that and these drafts: `count` tokens, or none."""
        if (read := len(self._text)) < len(self._prompt):  # an exception may have cut it off
            self._read(self._prompt[read:])
        self._read(self._new_tokens[len(self._text) - len(self._prompt) :])
        last = [*self._text[-self.SAME :], *drafts][-self.SAME :]
        place = self._next.get(tuple(last))
        if place is None:
            return []
        said = [*self._text[place : place + count], *drafts]
        for index in range(count):  # where the text ends, what has been quoted goes on: it repeats itself
            said.append(said[index])
        return said[-count:]
