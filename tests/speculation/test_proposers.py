"""What the two methods propose, and how long a draft pays."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.batch import IntArray
from nanovllm.speculation.draft_length import DraftRate, draft_length
from nanovllm.speculation.proposers import (
    NgramProposer,
    RecentOutputs,
    SuffixProposer,
    agreed,
    match_length,
    repeated,
)
from nanovllm.speculation.suffix_index import SuffixIndex
from nanovllm.speculative_config import SpeculativeConfig


def text(tokens: str | list[int]) -> IntArray:
    return np.array([*map(ord, tokens)] if isinstance(tokens, str) else tokens, dtype=np.int32)


def letters(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


def propose(proposer: NgramProposer | SuffixProposer, tokens: str, limit: int = 8) -> str:
    while proposer.read(text(tokens), 100):
        pass
    return letters(proposer.propose(text(tokens), limit))


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 4), st.lists(st.integers(1, 9)))
def test_the_index_finds_every_occurrence(tokens: list[int], size: int, parts: list[int]) -> None:
    """However the text is read; the run at its end has nothing after it, and is not among them."""
    index, known = SuffixIndex(size), text(tokens)
    for limit in [*parts, len(tokens)]:
        index.extend(known, limit)
    run = known[-size:].tobytes()
    expected = [end for end in range(len(known) - 1, size - 1, -1) if known[end - size : end].tobytes() == run]
    if len(known) >= size:
        assert index.occurrences(run, 100) == expected
        assert index.occurrences(run, 2) == expected[:2]


def test_ngram_continues_the_latest_occurrence() -> None:
    proposer = NgramProposer(2, 2)
    assert propose(proposer, "abcdeabXYZab") == "XYZabXYZ"
    assert propose(NgramProposer(2, 2), "abcdeabXYZab", limit=2) == "XY"
    assert propose(NgramProposer(3, 3), "abcdeabXYZab") == ""
    assert propose(NgramProposer(2, 2), "a") == ""


def test_ngram_prefers_the_longer_match() -> None:
    assert propose(NgramProposer(2, 4), "1abcX 2abcY 1abc", limit=1) == "X"
    assert propose(NgramProposer(2, 3), "1abcX 2abcY 1abc", limit=1) == "Y"  # no more than three are compared


def test_nothing_is_proposed_from_a_text_that_is_not_read() -> None:
    proposer, tokens = NgramProposer(2, 2), text("abcabcabc")
    assert proposer.read(tokens, 4) == 4
    assert proposer.propose(tokens, 3) == []
    assert proposer.read(tokens, 100) > 0
    assert letters(proposer.propose(tokens, 3)) == "abc"


def suffix(others: RecentOutputs | None = None, **values: float) -> SuffixProposer:
    return SuffixProposer(SpeculativeConfig("suffix", **values), others)  # type: ignore[arg-type]


def test_suffix_drafts_are_as_long_as_their_match() -> None:
    tokens = "the quick brown fox jumps. the qui"
    assert propose(suffix(), tokens, limit=24) == "ck brow"  # seven tokens match
    assert propose(suffix(suffix_decoding_max_spec_factor=2.0), tokens, limit=24) == "ck brown fox j"
    assert propose(suffix(suffix_decoding_max_tree_depth=4), tokens, limit=24) == "ck b"


def test_suffix_drafts_end_where_matches_disagree() -> None:
    tokens = "abcX1 abcX2 abcX3 abcY4 abc"
    assert propose(suffix(suffix_decoding_min_token_prob=0.5), tokens)[0] == "X"
    assert propose(suffix(suffix_decoding_min_token_prob=0.9), tokens) == ""


def test_suffix_finds_the_outputs_of_others() -> None:
    others = RecentOutputs(max_requests=2)
    others.add(text("hello world"))
    assert propose(suffix(others), "why hello", limit=3) == " wo"
    others.add(text("hello there"))
    assert propose(suffix(others), "why hello", limit=2) in (" w", " t")
    others.add(text("something else"))  # the first is forgotten
    assert propose(suffix(others), "why hello", limit=3) == " th"
    others.add(text("x"))
    others.add(text("yz"))
    assert propose(suffix(others), "why hello") == ""
    assert not others._occurrences


def test_others_are_bounded_in_tokens() -> None:
    others, rng = RecentOutputs(max_requests=100_000), random.Random(0)
    for _ in range(80):
        others.add(text([rng.randrange(1000) for _ in range(1000)]))
    assert others._num_tokens <= 1 << 16
    assert sum(map(len, others._occurrences.values())) <= 1 << 16


def test_parts() -> None:
    assert match_length(text("xabc"), text("yabcz"), 4, 9) == 3
    assert match_length(text("xabc"), text("yabcz"), 4, 2) == 2
    assert match_length(text("abc"), text("abcz"), 3, 9) == 3
    assert match_length(text("abc"), text("abz"), 3, 9) == 0
    assert letters(repeated(text("abcdef"), 4, 5)) == "efefe"
    assert agreed([[1, 2, 3], [1, 2], [1, 4]], 0.6) == [1, 2]
    assert agreed([[]], 0.1) == []


def test_a_rate_follows_what_became_of_drafts() -> None:
    rate = DraftRate()
    start = rate.share
    rate.observe(num_right=3, num_wrong=1)
    assert start * 0.85 < rate.share < 1
    for _ in range(50):
        rate.observe(num_right=0, num_wrong=1)
    assert rate.share < 0.01
    for _ in range(50):
        rate.observe(num_right=1, num_wrong=0)
    assert rate.share > 0.99


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_draft_is_shorter_the_more_rows_run_and_the_more_drafts_were_wrong(overlaps: bool) -> None:
    def length(share: float, num_rows: int) -> int:
        return draft_length(share, num_rows, 16, overlaps=overlaps)

    shares, sizes = [0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.99], [1, 4, 16, 64]
    for num_rows in sizes:
        lengths = [length(share, num_rows) for share in shares]
        assert lengths == sorted(lengths)
        assert lengths[0] == 0
        assert lengths[-1] >= 8
    for share in shares:
        lengths = [length(share, num_rows) for num_rows in sizes]
        assert lengths == sorted(lengths, reverse=True)
    assert (length(0.5, 1) > 0) is not overlaps  # half of the tokens pay only if no step is given up for them
