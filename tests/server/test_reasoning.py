"""The reasoning parser: the same messages under every split, nothing lost, nothing late."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.server.parsing import Delta
from nanovllm.server.reasoning import ReasoningParser
from tests.properties import examples
from tests.server.splits import assert_splits_agree, message

OPENED = "<|im_start|>assistant\n<think>\n"
CLOSED = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
PIECES = st.sampled_from(["<think>", "</think>", "<", "</", "think>", "<thi", "nk>", "\n", " ", "a", "word", "</think"])
TEXTS = st.lists(PIECES, max_size=12).map("".join)
PROMPTS = st.sampled_from(["", OPENED, CLOSED])


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "content"),
    [
        ("", "<think>\nI add.\n</think>\n\nFour.", "I add.", "Four."),
        ("", "\n<think>I add.</think>Four.", "I add.", "Four."),
        ("", "Four.", None, "Four."),
        ("", "  Four.\n", None, "  Four.\n"),
        ("", "<think>\n\n</think>\n\nFour.", None, "Four."),
        ("", "<think>\nI never end", "I never end", None),
        ("", "<think>\nI nearly end</thin", "I nearly end</thin", None),
        ("", "<thin", None, "<thin"),
        ("", "", None, None),
        ("", "The tag <think> is text.</think>", None, "The tag <think> is text.</think>"),
        ("", "<think>a\n\n b\n</think>\nFour.\n", "a\n\n b", "Four.\n"),
        (OPENED, "I add.\n</think>\n\nFour.", "I add.", "Four."),
        (OPENED, "I never end", "I never end", None),
        (CLOSED, "Four.", None, "Four."),
        (CLOSED, "<think>is text", None, "<think>is text"),
    ],
)
def test_a_text_is_separated(prompt: str, text: str, reasoning: str | None, content: str | None) -> None:
    for pieces in ([text], list(text)):
        parsed = message(ReasoningParser(prompt), pieces)
        assert (parsed.reasoning, parsed.content) == (reasoning or "", content or "")


@pytest.mark.parametrize(
    ("continued", "reasoning", "content"),
    [("<think>\nI", " add.", "Four."), ("Two and two is", None, " add.</think>Four.")],
)
def test_a_continued_message_says_whether_the_block_is_open(continued: str, reasoning: str, content: str) -> None:
    parsed = message(ReasoningParser(continued, continued), [" add.</think>Four."])
    assert (parsed.reasoning, parsed.content) == (reasoning or "", content or "")


@settings(max_examples=examples(400), deadline=None)
@given(PROMPTS, TEXTS, st.data())
def test_any_split_gives_the_same_message(prompt: str, text: str, data: st.DataObject) -> None:
    assert_splits_agree(lambda: ReasoningParser(prompt), text, data)


@settings(max_examples=examples(400), deadline=None)
@given(PROMPTS, TEXTS)
def test_nothing_is_lost_but_tags_and_the_line_breaks_at_them(prompt: str, text: str) -> None:
    parsed = message(ReasoningParser(prompt), [text])
    parts = parsed.reasoning + parsed.content
    rest = iter(text)
    assert all(character in rest for character in parts), "the parts are in the text, in order"
    dropped = len(text) - len(parts)
    assert dropped <= len("<think></think>") + text.count("\n") + text.count(" ")


def test_text_that_is_part_of_no_tag_goes_out_at_once() -> None:
    parser = ReasoningParser()
    assert parser.feed("<think>") == []
    assert parser.feed("\nI") == [Delta(reasoning="I")]
    assert parser.feed(" add < b") == [Delta(reasoning=" add < b")]
    assert parser.feed(" </th") == [Delta(reasoning=" ")]
    assert parser.feed("e rest") == [Delta(reasoning="</the rest")]
    assert parser.feed("\n</think>\n") == []
    assert parser.feed("\nFour") == [Delta(content="Four")]
    assert parser.feed("\n<think>\n") == [Delta(content="\n<think>\n")]
    assert parser.finish() == []
