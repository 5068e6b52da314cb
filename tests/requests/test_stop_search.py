"""StopSearch finds what a plain search finds, and takes as long with many strings as with one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.requests.stop_search import StopMatch, StopMatcher, StopSearch
from tests.properties import examples

texts = st.text(alphabet="abé", min_size=1, max_size=5)


def plain_match(stop: list[str], known: str, new: str) -> StopMatch | None:
    text = known + new
    matches = [
        (start, order, string)
        for order, string in enumerate(stop)
        for start in range(len(text))
        if text.startswith(string, start) and start + len(string) > len(known)
    ]
    return StopMatch(min(matches)[0], min(matches)[2]) if matches else None


@settings(max_examples=examples(2000), deadline=None)
@given(st.lists(texts, min_size=1, max_size=8), st.lists(st.text(alphabet="abéc", max_size=6), max_size=8))
def test_it_finds_what_a_plain_search_finds(stop: list[str], pieces: list[str]) -> None:
    search = StopSearch(tuple(stop))
    for _ in range(2):  # the second text goes through states that the first one made
        matcher, text = StopMatcher(search), ""
        for piece in pieces:
            assert matcher.add(piece) == plain_match(stop, text, piece)
            text += piece
            sizes = range(1, len(text) + 1)
            held = [size for size in sizes if any(string.startswith(text[-size:]) for string in stop)]
            assert matcher.num_held == max(held, default=0)


class CountingSearch(StopSearch):
    """Counts the successors that it looks for among the strings."""

    count = 0

    def _child(self, *arguments, **keywords):  # type: ignore[no-untyped-def]
        self.count += 1
        return super()._child(*arguments, **keywords)


def test_the_cost_of_a_character_does_not_grow_with_the_strings() -> None:
    text = "the quick brown fox jumps over the lazy dog, 12 times. " * 20

    def cost(num_strings: int) -> int:
        search = CountingSearch(tuple(f"the quick brown fox {number}" for number in range(num_strings)))
        assert StopMatcher(search).add(text) is None
        return search.count

    assert cost(20_000) == cost(1) < len(text)


def test_long_strings_that_repeat_cost_no_recursion() -> None:
    stop = tuple("a" * length + "b" for length in range(3000))
    matcher = StopMatcher(StopSearch(stop))
    assert matcher.add("a" * 3000) is None
    assert matcher.num_held == 2999
    assert matcher.add("b") == StopMatch(1, "a" * 2999 + "b")
