"""Detokenizer and StopStrings: any tokens, one at a time, read as they do all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import nanovllm
from nanovllm.requests.detokenizer import Detokenizer, StopStrings, decode

TOKENIZER: Any = AutoTokenizer.from_pretrained(Path(nanovllm.__file__).parent / "assets" / "tiny-qwen3")
token_lists = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30)


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text)
    return ids


def pieces(token_ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER, skip_special_tokens)
    return [detokenizer.add(token) for token in token_ids]


def stopped(token_ids: list[int], *stop: str, include: bool = False) -> tuple[str | None, str, int]:
    """What stopped it, the text, and how many tokens that took."""
    watch = StopStrings(stop, Detokenizer(TOKENIZER, True), include)
    for count, token in enumerate(token_ids, start=1):
        reason = watch.add(token)
        if reason is not None:
            return reason, watch.text, count
    return None, watch.text, len(token_ids)


@given(token_lists, st.booleans())
def test_random_tokens_read_as_when_decoded_at_once(token_ids: list[int], skip_special_tokens: bool) -> None:
    """Half characters and stray bytes included: only replacements at the end may be held back."""
    shown = "".join(pieces(token_ids, skip_special_tokens))
    whole = decode(TOKENIZER, token_ids, skip_special_tokens)
    assert whole.startswith(shown)
    assert set(whole[len(shown) :]) <= {"\ufffd"}
    assert len(whole) - len(shown) <= 3


@given(token_lists, st.lists(st.integers(1, 5), min_size=30, max_size=30))
def test_tokens_read_the_same_in_any_portions(token_ids: list[int], sizes: list[int]) -> None:
    detokenizer = Detokenizer(TOKENIZER, True)
    shown, rest = "", token_ids
    for size in sizes:
        shown += detokenizer.add(*rest[:size])
        rest = rest[size:]
        assert "".join(pieces(token_ids[: len(token_ids) - len(rest)])) == shown


@given(st.text(alphabet="aé€漢😀\u200d👩 \n\u0301", max_size=20))
def test_characters_are_never_shown_half(text: str) -> None:
    token_ids = encode(text)
    shown = pieces(token_ids)
    assert "\ufffd" not in "".join(shown)
    assert "".join(shown) == decode(TOKENIZER, token_ids, True)


def test_a_character_comes_with_its_last_token() -> None:
    token_ids = encode("😀")
    assert len(token_ids) > 1, "the test needs a character that is split"
    *before, last = pieces(token_ids)
    assert (set(before), last) == ({""}, "😀")


@given(token_lists, st.lists(st.integers(0, 40), min_size=1, max_size=3), st.integers(1, 6), st.booleans())
def test_the_first_stop_string_ends_the_text(
    token_ids: list[int], starts: list[int], length: int, include: bool
) -> None:
    shown = "".join(pieces(token_ids))
    stop = [shown[start : start + length] for start in starts if shown[start : start + length]]
    if not stop:
        return
    reason, text, count = stopped(token_ids, *stop, include=include)
    assert reason in stop
    body = text.removesuffix(reason) if include else text
    assert shown.startswith(body + reason)
    assert all(other not in body for other in stop), "a stop string stands before the one that ended it"
    before = "".join(pieces(token_ids[: count - 1]))
    assert all(other not in before for other in stop), "it could have stopped sooner"


def test_stop_strings_across_tokens() -> None:
    token_ids = encode("introduce yourself in two words")
    text = TOKENIZER.decode(token_ids)
    stop = text[5:18]
    assert all(stop not in TOKENIZER.decode([token]) for token in token_ids), "the test needs one that spans tokens"
    assert stopped(token_ids, stop)[:2] == (stop, text[:5])
    assert stopped(token_ids, stop, include=True)[:2] == (stop, text[:18])


def test_a_stop_string_that_came_too_early_does_not_count_later() -> None:
    """Its text may have been shown; that of a longer one, which also looks far back, must not bring it up again."""
    text = "abcdefghij"
    watch = StopStrings(("bc", "no such text"), Detokenizer(TOKENIZER, True), False, min_tokens=4)
    token_ids = [token for character in text for token in encode(character)]
    assert len(token_ids) == len(text)
    assert [watch.add(token) for token in token_ids] == [None] * len(text)
    assert watch.text == text


@pytest.mark.parametrize("stop", ["xyzzy", "introduce yourself!"])
def test_a_stop_string_that_does_not_come_ends_nothing(stop: str) -> None:
    token_ids = encode("introduce yourself in two words")
    assert stopped(token_ids, stop) == (None, TOKENIZER.decode(token_ids), len(token_ids))
