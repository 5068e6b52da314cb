"""TextEvents: events that are encoded in parts have the bytes of those that are encoded whole."""

from __future__ import annotations

from functools import partial
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nanovllm.server.responses import TextEvents, event

names = st.text(alphabet='a"\\:té {}', max_size=12) | st.sampled_from(['"text":', '"text":"a"'])


def chunk(model: str, index: int, text: str) -> Any:
    return {"model": model, "choices": [{"index": index, "text": text, "logprobs": None}], "usage": None}


@given(names, st.lists(st.tuples(st.integers(0, 2), names | st.text(max_size=6)), max_size=8))
def test_the_bytes_of_events(model: str, parts: list[tuple[int, str]]) -> None:
    texts = TextEvents("text")
    for index, text in parts:
        assert texts.event(index, text, partial(chunk, model, index, text)) == event(chunk(model, index, text))


def test_only_the_first_event_of_an_index_is_encoded_whole() -> None:
    texts, made = TextEvents("text"), []

    def make() -> Any:
        made.append(index)
        return chunk("tiny", index, "a")

    for index in (0, 0, 1, 0, 1):
        texts.event(index, "a", make)
    assert made == [0, 1]
