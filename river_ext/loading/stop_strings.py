"""Stop strings, found in a text that comes bit by bit."""

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """An automaton after Aho and Corasick: each character is looked at once, however many strings there are.

    A state is the longest end of the text that begins a stop string; state 0 is the empty one.
    """

    def __init__(self, strings: Sequence[str] = ()):
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self.length = [0]  # of the end of the text that a state stands for
        self.match = [0]  # length of the longest stop string that the text of a state ends with, 0 without
        for string in strings:
            self._add(string)
        self._link()

    def __bool__(self) -> bool:
        return len(self._next) > 1

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)

    def _add(self, string: str) -> None:
        state = 0
        for length, character in enumerate(string, start=1):
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self.length.append(length)
                self.match.append(0)
            state = self._next[state][character]
        self.match[state] = len(string)

    def _link(self) -> None:
        """Lets each state fall back to the longest proper end of its text that is a state too."""
        todo = deque(self._next[0].values())  # short ones first
        while todo:
            state = todo.popleft()
            self.match[state] = self.match[state] or self.match[self._fallback[state]]
            for character, following in self._next[state].items():
                self._fallback[following] = self.step(self._fallback[state], character)
                todo.append(following)
