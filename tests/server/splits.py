"""Texts cut into pieces, and what a parser makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from nanovllm.server.parsing import ParsedMessage


def message(parser: Any, pieces: Sequence[str]) -> ParsedMessage:
    """What the parser makes of the pieces; the ids, which are random, are checked to differ and left out."""
    whole = ParsedMessage()
    for piece in pieces:
        whole.add(parser.feed(piece))
    whole.add(parser.finish())
    ids = [call.id for call in whole.tool_calls]
    assert len(set(ids)) == len(ids)
    assert all(ids)
    for call in whole.tool_calls:
        call.id = ""
    return whole


def pieces_of(text: str) -> st.SearchStrategy[list[str]]:
    cuts = st.lists(st.integers(0, len(text)), max_size=len(text)).map(sorted)
    return cuts.map(lambda at: [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)])


def assert_splits_agree(make: Callable[[], Any], text: str, data: st.DataObject) -> None:
    whole = message(make(), [text])
    assert message(make(), list(text)) == whole
    assert message(make(), data.draw(pieces_of(text))) == whole
