"""Detokenizer and StopStrings: the tokens of any tokenizer, one at a time, read as they do all at once."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import nanovllm
from nanovllm.requests.detokenizer import Detokenizer, StopStrings, decode, token_texts
from nanovllm.requests.stop_search import StopSearch
from tests.properties import examples
from tests.requests.tokenizer_kinds import BYTE_LEVEL, KINDS, LLAMA, byte_tokens

TOKENIZER: Any = AutoTokenizer.from_pretrained(Path(nanovllm.__file__).parent / "assets" / "tiny-qwen3")
token_lists = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30)


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text)
    return ids


def pieces(token_ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER, skip_special_tokens)
    return [detokenizer.add(token) for token in token_ids]


def stopped(
    token_ids: list[int], *stop: str, include: bool = False, tokenizer: Any = TOKENIZER
) -> tuple[str | None, str, int]:
    """What stopped it, the text up to there, and how many tokens that took."""
    watch = StopStrings(StopSearch(stop), Detokenizer(tokenizer, True), include)
    for count, token in enumerate(token_ids, start=1):
        reason = watch.add(token)
        if reason is not None:
            return reason, watch.text, count
    return watch.end(), watch.text, len(token_ids)


@given(token_lists, st.booleans())
def test_random_tokens_read_as_when_decoded_at_once(token_ids: list[int], skip_special_tokens: bool) -> None:
    """Half characters and stray bytes included: only a replacement at the end may be held back."""
    shown = "".join(pieces(token_ids, skip_special_tokens))
    whole = decode(TOKENIZER, token_ids, skip_special_tokens)
    assert whole in (shown, shown + "\ufffd")


# ---- every kind of tokenizer


class _WithItsOwnText(type(TOKENIZER)):  # type: ignore[misc]
    """As a tokenizer that comes with a checkpoint."""

    def _decode(self, *_: Any, **__: Any) -> str:
        return "its own"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(50), deadline=None)
@given(data=st.data())
def test_decoding_is_the_tokenizer_s(kind: str, data: st.DataObject) -> None:
    tokenizer, skips = KINDS[kind], data.draw(st.booleans())
    token_ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    expected = tokenizer.decode(token_ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False)
    assert decode(tokenizer, token_ids, skips) == expected


def test_a_tokenizer_that_decodes_itself_is_asked() -> None:
    folder = Path(nanovllm.__file__).parent / "assets" / "tiny-qwen3"
    assert decode(_WithItsOwnText.from_pretrained(folder), [5, 6], True) == "its own"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(800), deadline=None)
@given(data=st.data())
def test_streamed_text_is_the_final_text(kind: str, data: st.DataObject) -> None:
    """Whatever tokens follow, what was shown stays; when none follow, all is shown. The last ids are no tokens."""
    tokenizer = KINDS[kind]
    ids = st.integers(0, len(tokenizer) + 2)
    few = st.lists(ids, min_size=1, max_size=3).flatmap(st.sampled_from)  # long runs of the same, and specials
    portions = data.draw(st.lists(st.lists(ids | few, min_size=1, max_size=6), max_size=12))
    skip_special_tokens = data.draw(st.booleans())
    token_ids = [token for portion in portions for token in portion]
    final = decode(tokenizer, token_ids, skip_special_tokens)
    detokenizer, shown, count = Detokenizer(tokenizer, skip_special_tokens), "", 0
    for portion in portions:
        shown += detokenizer.add(*portion)
        count += len(portion)
        assert final.startswith(shown)
        assert shown + detokenizer.end() == decode(tokenizer, token_ids[:count], skip_special_tokens)


@pytest.mark.parametrize(
    "kind", ["byte level", "byte fallback", "byte fallback, prefix space", "Unigram, byte fallback"]
)
@settings(max_examples=examples(400), deadline=None)
@given(text=st.text(alphabet="é€漢😀", min_size=1, max_size=12), specials=st.lists(st.integers(0, 60), max_size=4))
def test_characters_in_bytes_are_never_shown_half(kind: str, text: str, specials: list[int]) -> None:
    """Also with skipped special tokens between their bytes."""
    tokenizer = KINDS[kind]
    token_ids = byte_tokens(tokenizer, text)
    for place in specials:
        token_ids.insert(place, tokenizer.eos_token_id)
    detokenizer = Detokenizer(tokenizer, True)
    shown = ""
    for token in token_ids:
        shown += detokenizer.add(token)
        assert text.startswith(shown)
    assert shown + detokenizer.end() == text


@pytest.mark.parametrize(("text", "end"), [("😀😀", "x"), ("日本語", "▁a")])
def test_a_stop_string_after_characters_in_bytes_is_found(text: str, end: str) -> None:
    token_ids = [*byte_tokens(LLAMA, text), LLAMA.convert_tokens_to_ids(end)]
    whole = text + end.replace("▁", " ")
    assert stopped(token_ids, whole[-2:], tokenizer=LLAMA) == (whole[-2:], whole[:-2], len(token_ids))
    assert stopped(token_ids[:-1], text[-1], tokenizer=LLAMA)[:2] == (text[-1], text[: text.index(text[-1])])


def test_the_space_after_skipped_tokens_stays() -> None:
    a = LLAMA.convert_tokens_to_ids("▁a")
    detokenizer = Detokenizer(LLAMA, True)
    assert [detokenizer.add(token) for token in [a, *[LLAMA.eos_token_id] * 40, a]][-1] == " a"


class BytesAsTokens:
    """A tokenizer like those of some checkpoints with code of their own: its tokens are bytes."""

    def convert_ids_to_tokens(self, token_id: int) -> bytes:
        return bytes([token_id])

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return bytes(token_ids).decode("utf-8", "replace")


def test_tokens_may_be_bytes() -> None:
    detokenizer = Detokenizer(BytesAsTokens(), True)
    text = "<0x41> 日本 😀\n" * 5
    assert "".join(detokenizer.add(byte) for byte in text.encode()) == text


# ---- the cost


class Counting:
    """A tokenizer that counts the tokens it decodes and names."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.count = tokenizer, 0

    def decode(self, token_ids: list[int], **settings: Any) -> str:
        self.count += len(token_ids)
        return str(self.tokenizer.decode(token_ids, **settings))

    def convert_ids_to_tokens(self, token_id: int) -> Any:
        self.count += 1
        return self.tokenizer.convert_ids_to_tokens(token_id)


RUNS = {
    "text": (BYTE_LEVEL, ["ab"]),
    "bytes that begin no character": (BYTE_LEVEL, ["ÿ"]),
    "bytes that only begin characters": (BYTE_LEVEL, ["ðŁ"]),
    "byte tokens": (LLAMA, ["<0xFF>"]),
    "byte tokens and skipped ones": (LLAMA, ["<0xE2>", "</s>"]),
    "skipped tokens": (LLAMA, ["</s>"]),
    "spaces": (LLAMA, ["▁"]),
}


@pytest.mark.parametrize("run", RUNS)
def test_the_cost_of_a_token_does_not_grow(run: str) -> None:
    tokenizer, names = RUNS[run]
    token_ids = tokenizer.convert_tokens_to_ids(names)

    def cost(num_tokens: int) -> int:
        counting = Counting(tokenizer)
        watch = StopStrings(StopSearch(("no such text",)), Detokenizer(counting, True), False)
        for index in range(num_tokens):
            assert watch.add(token_ids[index % len(token_ids)]) is None
        return counting.count

    costs = [cost(num_tokens) for num_tokens in (500, 1000, 1500)]
    assert costs[2] - costs[1] <= 1.1 * (costs[1] - costs[0]) <= 1.1 * 30 * 500


# ---- portions, characters and stop strings


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
    watch = StopStrings(StopSearch(("bc", "no such text")), Detokenizer(TOKENIZER, True), False, min_tokens=4)
    token_ids = [token for character in text for token in encode(character)]
    assert len(token_ids) == len(text)
    assert [watch.add(token) for token in token_ids] == [None] * len(text)
    assert watch.end() is None


@pytest.mark.parametrize("stop", ["xyzzy", "introduce yourself!"])
def test_a_stop_string_that_does_not_come_ends_nothing(stop: str) -> None:
    token_ids = encode("introduce yourself in two words")
    assert stopped(token_ids, stop) == (None, "", len(token_ids))


def test_tokens_of_whole_characters_are_decoded_once() -> None:
    """By a byte-level tokenizer, for all requests."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BYTE_LEVEL.backend_tokenizer)
    token_ids = tokenizer.convert_tokens_to_ids(["ab", "ðŁ", "ĺĢ", "ab"])
    for _ in range(2):
        detokenizer = Detokenizer(tokenizer, True)
        assert [detokenizer.add(token_id) for token_id in token_ids] == ["ab", "", "😀", "ab"]
        assert detokenizer.end() == ""
    assert token_texts(tokenizer, True) == {token_ids[0]: "ab", token_ids[1]: None}
    assert token_texts(tokenizer, False) == {}
    gone = weakref.ref(tokenizer)
    del tokenizer, detokenizer
    gc.collect()
    assert gone() is None
