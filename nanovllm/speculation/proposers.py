"""Proposers: what may follow a text, judging by what followed its last tokens before."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from typing import Protocol

from nanovllm.engine.batch import IntArray
from nanovllm.speculation.suffix_index import SuffixIndex
from nanovllm.speculative_config import SpeculativeConfig

_MAX_OCCURRENCES = 16  # that are compared
_SUFFIX_RUN = 3  # tokens that a match has at least
_MAX_CACHED_TOKENS = 1 << 16  # of the outputs of other requests


class Proposer(Protocol):
    """Drafts the continuation of one sequence, whose tokens grow."""

    def read(self, tokens: IntArray, limit: int) -> int:
        """Takes the tokens that are new since the last call, at most `limit`. Returns how many it took.

        tokens: all tokens so far.
        """
        ...

    def propose(self, tokens: IntArray, limit: int) -> list[int]:
        """Returns up to `limit` tokens that may follow `tokens`; [] if nothing suggests any, or not all are read."""
        ...


class NgramProposer:
    """Continues the text as it went on at an earlier occurrence of its last tokens (prompt lookup decoding).

    Of the latest occurrences it takes the one with the most equal tokens before it, up to `longest`.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._index = SuffixIndex(shortest)
        self._longest = longest

    def read(self, tokens: IntArray, limit: int) -> int:
        return self._index.extend(tokens, limit)

    def propose(self, tokens: IntArray, limit: int) -> list[int]:
        size = self._index.size
        if self._index.num_read < len(tokens):
            return []
        found = self._index.occurrences(tokens[-size:].tobytes(), 1 if size == self._longest else _MAX_OCCURRENCES)
        if not found:
            return []
        best = found[0]
        if len(found) > 1:
            best = max(found, key=lambda end: match_length(tokens, tokens, end, self._longest))  # of equals the latest
        return repeated(tokens, best, limit)


class SuffixProposer:
    """Continues the longest match of the text's end, as long as enough of its occurrences agree (suffix decoding).

    Occurrences are those in the text itself and in `others`. The draft is at most `factor` times as long as the match.
    """

    def __init__(self, config: SpeculativeConfig, others: RecentOutputs | None) -> None:
        self._index = SuffixIndex(_SUFFIX_RUN)
        self._others = others
        self._depth = config.suffix_decoding_max_tree_depth
        self._factor = config.suffix_decoding_max_spec_factor
        self._min_share = config.suffix_decoding_min_token_prob

    def read(self, tokens: IntArray, limit: int) -> int:
        return self._index.extend(tokens, limit)

    def propose(self, tokens: IntArray, limit: int) -> list[int]:
        if self._index.num_read < len(tokens):
            return []
        run = tokens[-_SUFFIX_RUN:].tobytes()
        found = [(tokens, end) for end in self._index.occurrences(run, _MAX_OCCURRENCES)]
        if self._others is not None:
            found += self._others.occurrences(run, _MAX_OCCURRENCES)
        if not found:
            return []
        lengths = [match_length(tokens, text, end, self._depth) for text, end in found]
        longest = max(lengths)
        most = min(limit, int(self._factor * longest))
        matches = [match for match, length in zip(found, lengths, strict=True) if length == longest]
        following = [
            repeated(text, end, most) if text is tokens else text[end : end + most].tolist() for text, end in matches
        ]
        return agreed(following, self._min_share)


class RecentOutputs:
    """The outputs of the latest requests, which others may repeat: at most `max_requests`, of 65,536 tokens in all."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._outputs: deque[IntArray] = deque()
        self._num_tokens = 0
        self._occurrences: dict[bytes, list[tuple[IntArray, int]]] = {}  # of each run, oldest first

    def add(self, output: IntArray) -> None:
        """Adds the output of a request that has ended, and forgets the oldest ones."""
        output = output[:_MAX_CACHED_TOKENS]
        self._outputs.append(output)
        self._num_tokens += len(output)
        for end, run in _runs(output):
            self._occurrences.setdefault(run, []).append((output, end))
        while len(self._outputs) > self._max_requests or self._num_tokens > _MAX_CACHED_TOKENS:
            self._forget_oldest()

    def clear(self) -> None:
        self._outputs.clear()
        self._occurrences.clear()
        self._num_tokens = 0

    def occurrences(self, run: bytes, limit: int) -> list[tuple[IntArray, int]]:
        """Returns the latest `limit` occurrences of a run: an output, and the position after the run."""
        return self._occurrences.get(run, [])[-limit:]

    def _forget_oldest(self) -> None:
        output = self._outputs.popleft()
        self._num_tokens -= len(output)
        for _, run in _runs(output):
            del self._occurrences[run][0]
            if not self._occurrences[run]:
                del self._occurrences[run]


def _runs(output: IntArray) -> Iterator[tuple[int, bytes]]:
    """Yields the runs of an output that have a token after them, each with the position of that token."""
    text = output.tobytes()
    for end in range(_SUFFIX_RUN, len(output)):
        yield end, text[(end - _SUFFIX_RUN) * output.itemsize : end * output.itemsize]


def match_length(tokens: IntArray, text: IntArray, end: int, longest: int) -> int:
    """Returns how many tokens at the end of `tokens` equal those of `text` before `end`, at most `longest`."""
    size = min(longest, end, len(tokens))
    differs = (tokens[len(tokens) - size :] != text[end - size : end])[::-1]
    return int(differs.argmax()) if differs.any() else size


def repeated(text: IntArray, end: int, limit: int) -> list[int]:
    """Returns the `limit` tokens of `text` from `end` on. Past its end the same tokens follow again."""
    found: list[int] = text[end : end + limit].tolist()
    period = len(text) - end
    while len(found) < limit:
        found += found[len(found) - period :][: limit - len(found)]
    return found


def agreed(continuations: list[list[int]], min_share: float) -> list[int]:
    """Returns the most frequent continuation, up to the first token that less than `min_share` of all have."""
    draft: list[int] = []
    alive, needed = continuations, min_share * len(continuations)
    while alive := [each for each in alive if len(each) > len(draft)]:
        token, count = Counter(each[len(draft)] for each in alive).most_common(1)[0]
        if count < needed:
            break
        alive = [each for each in alive if each[len(draft)] == token]
        draft.append(token)
    return draft


def make_proposer(config: SpeculativeConfig, others: RecentOutputs | None) -> Proposer:
    """Returns the proposer of a sequence."""
    if config.method == "ngram":
        return NgramProposer(*config.lookup)
    return SuffixProposer(config, others)
