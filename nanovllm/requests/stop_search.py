"""StopSearch: finds stop strings in a text that comes in pieces, in a time that does not grow with their number."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import NamedTuple


class StopMatch(NamedTuple):
    """A stop string, and the index of its first character in the text."""

    start: int
    stop: str


class StopSearch:
    """The stop strings of a request as an Aho-Corasick automaton, of which only the states that texts reach are built.

    A state stands for the longest end of a text that begins a stop string, which is a range of the sorted strings.
    Several threads may use one StopSearch.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.order = {string: index for index, string in reversed(list(enumerate(stop)))}
        self._sorted = sorted(self.order)
        self.start = _State(0, len(self._sorted), depth=0, fallback=None, stop=None)

    def step(self, state: _State, character: str) -> _State:
        """Returns the state after another character."""
        passed = []  # states without a known successor, from the longest end of the text to the shortest
        while character not in state.next and state.fallback is not None:
            passed.append(state)
            state = state.fallback
        if character not in state.next:
            state.next[character] = self._child(state, character, fallback=state) or state
        successor = state.next[character]
        for state in reversed(passed):
            successor = state.next[character] = self._child(state, character, fallback=successor) or successor
        return successor

    def _child(self, state: _State, character: str, fallback: _State) -> _State | None:
        """Returns the state of the strings that go on with `character`; None if there are none."""
        depth = state.depth

        def next_character(string: str) -> str:
            return string[depth : depth + 1]

        first = bisect_left(self._sorted, character, state.first, state.end, key=next_character)
        end = bisect_right(self._sorted, character, first, state.end, key=next_character)
        if first == end:
            return None
        shortest = self._sorted[first]
        return _State(first, end, depth + 1, fallback, shortest if len(shortest) == depth + 1 else fallback.stop)


class _State:
    """The strings of indices `first` to `end - 1`, of which a text has the first `depth` characters at its end."""

    __slots__ = ("depth", "end", "fallback", "first", "next", "stop")

    def __init__(self, first: int, end: int, depth: int, fallback: _State | None, stop: str | None) -> None:
        self.first, self.end, self.depth = first, end, depth
        self.fallback = fallback  # the longest shorter end of the text that begins a stop string; None at the start
        self.stop = stop  # the longest stop string at the end of the text
        self.next: dict[str, _State] = {}


class StopMatcher:
    """Follows one text through a StopSearch."""

    def __init__(self, search: StopSearch) -> None:
        self._search = search
        self._state = search.start
        self._num_characters = 0

    @property
    def num_held(self) -> int:
        """The number of characters at the end of the text that may begin a stop string."""
        return self._state.depth

    def add(self, text: str) -> StopMatch | None:
        """Takes the text that follows. Returns the leftmost of the stop strings that end in it, or None.

        Of several at the same place it is the one that was given first.
        """
        found: list[StopMatch] = []
        for character in text:
            self._state = self._search.step(self._state, character)
            self._num_characters += 1
            if (stop := self._state.stop) is not None:
                found.append(StopMatch(self._num_characters - len(stop), stop))
        return min(found, key=lambda match: (match.start, self._search.order[match.stop]), default=None)
