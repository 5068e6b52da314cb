"""SuffixIndex: where each run of a few tokens occurs in a text that grows."""

from __future__ import annotations

from array import array

from nanovllm.engine.batch import IntArray


class SuffixIndex:
    """Finds the occurrences of runs of `size` tokens, latest first.

    Equal runs are chained: each position knows the one before it. A token takes one step of a loop when it is read, and
    some 150 bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._latest: dict[bytes, int] = {}  # of each run, the position after its latest occurrence
        self._earlier = array("i", [-1] * size)  # for the position after a run, the one after its occurrence before

    @property
    def num_read(self) -> int:
        """Number of tokens that were read."""
        return len(self._earlier)

    def extend(self, tokens: IntArray, limit: int) -> int:
        """Reads what `tokens` has beyond the tokens that were read, at most `limit` of them. Returns how many.

        The run at the end of what was read is known only after the token behind it.
        """
        first, end = self.num_read, min(len(tokens), self.num_read + limit)
        if first >= end:
            return 0
        width, latest, earlier = tokens.itemsize, self._latest, self._earlier
        text, size = tokens[first - self.size : end].tobytes(), self.size * tokens.itemsize
        for position in range(first, end):
            start = (position - first) * width
            run = text[start : start + size]
            earlier.append(latest.get(run, -1))
            latest[run] = position
        return end - first

    def occurrences(self, run: bytes, limit: int) -> list[int]:
        """Returns the positions after the latest `limit` occurrences of a run, latest first."""
        found: list[int] = []
        position = self._latest.get(run, -1)
        while position >= 0 and len(found) < limit:
            found.append(position)
            position = self._earlier[position]
        return found
