"""Tool parsers: the same messages under every split, nothing lost, nothing late."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.server.parsers import TOOL_PARSERS
from nanovllm.server.parsing import Chain, Delta, ToolCallDelta, parse
from nanovllm.server.reasoning import ReasoningParser
from nanovllm.server.tool_parsers.call_array import CallArrayParser
from nanovllm.server.tool_parsers.named_call import NamedCallParser
from nanovllm.server.tool_parsers.tool_parser import ToolParser
from tests.properties import examples
from tests.server.splits import assert_splits_agree, message

PARSERS: dict[str, Callable[[], ToolParser]] = {
    **TOOL_PARSERS,
    "array": CallArrayParser,
    "named": lambda: NamedCallParser("f"),
}
F = '{"name": "f", "arguments": {"a": [1, "}"]}}'
G = '{"name": "g", "arguments": {}}'
F_CALL, G_CALL = ("f", '{"a": [1, "}"]}'), ("g", "{}")
BROKEN = '{"name": "f", "arguments": {"a": ]'

CASES = [
    # what Qwen3 writes
    ("hermes", f"<tool_call>\n{F}\n</tool_call>", None, [F_CALL]),
    ("hermes", f"Wait.\n<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{G}\n</tool_call>", "Wait.", [F_CALL, G_CALL]),
    ("hermes", f"<tool_call>{F}</tool_call> and <tool_call>{G}</tool_call> done\n", " and done\n", [F_CALL, G_CALL]),
    ("hermes", "No call.\n", "No call.\n", []),
    ("hermes", f"<tool_call>{F}", None, [F_CALL]),
    ("hermes", f"<tool_call>{F}</tool_", None, [F_CALL]),
    ("hermes", f"<tool_call>{F[:-1]}</tool_call>", None, [F_CALL]),  # a brace is missing
    ("hermes", f"<tool_call>{F}}}</tool_call>", "}</tool_call>", [F_CALL]),  # one too many
    # the keys in another order, and keys that are of no use
    ("hermes", '<tool_call>{"arguments": {"a": "é"}, "name": "f"}</tool_call>', None, [("f", '{"a": "\\u00e9"}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}, "id": "{"}</tool_call>', None, [("f", "{}")]),
    ("hermes", '<tool_call>{"id": 1, "name": "f", "arguments": {}}</tool_call>', None, [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "parameters": {}}</tool_call>', None, [("f", "{}")]),
    # an end mark in a string; a line break in one
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>\n\\""}}</tool_call>',
        None,
        [("f", '{"a": "</tool_call>\n\\""}')],
    ),
    # no calls: all of it comes back
    *(
        ("hermes", text, text, [])
        for text in (
            "<tool_call>",
            "<tool_call>\nf(1)\n</tool_call>",
            '<tool_call>{"name": "f"}</tool_call>',
            '<tool_call>{"name": "f", "arguments": 5}</tool_call>',
            '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
            '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
            '<tool_call>{"other": {"name": "f"}}</tool_call>',
            '<tool_call>{"name": "f", "argum',
            '<tool_call>{"name": "f", </tool_call>',
            '<tool_call>{"arguments": {"a": NaN}, "name": "f"}</tool_call>',
            "Hello <tool_cal",
        )
    ),
    ("hermes", f"<tool_call>no<tool_call>{F}</tool_call>", "<tool_call>no", [F_CALL]),
    # a fault after the call was announced stays in its arguments, up to the end mark
    ("hermes", f"<tool_call>{BROKEN}x</tool_call>y", "y", [("f", '{"a": ]x')]),
    ("hermes", f"<tool_call>{BROKEN}x", None, [("f", '{"a": ]x')]),
    ("llama3_json", F.replace("arguments", "parameters"), None, [F_CALL]),
    ("llama3_json", f"<|python_tag|>{F}; {G}", None, [F_CALL, G_CALL]),
    ("llama3_json", f"\n\n{F},\n{G} ", None, [F_CALL, G_CALL]),
    ("llama3_json", f"Wait. <|python_tag|>{F}", "Wait.", [F_CALL]),
    ("llama3_json", f"{F} done", " done", [F_CALL]),
    ("llama3_json", f"{F}; done", "; done", [F_CALL]),
    ("llama3_json", f"See {F}", f"See {F}", []),
    ("llama3_json", '{"answer": 5}', '{"answer": 5}', []),
    ("llama3_json", "{}", "{}", []),
    ("llama3_json", '<|python_tag|>search.call(query="a")', '<|python_tag|>search.call(query="a")', []),
    ("llama3_json", f"{BROKEN}x", None, [("f", '{"a": ]x')]),
    ("mistral", f"[TOOL_CALLS] [{F}, {G}]", None, [F_CALL, G_CALL]),
    ("mistral", f"Wait. [TOOL_CALLS][{F}]\nMore", "Wait.\nMore", [F_CALL]),
    ("mistral", '[TOOL_CALLS]f{"a": [1, "}"]}[TOOL_CALLS]g{}', None, [F_CALL, G_CALL]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": [1, "}"]}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{}', None, [F_CALL, G_CALL]),
    ("mistral", "[TOOL_CALLS] no call", "[TOOL_CALLS] no call", []),
    ("mistral", "[TOOL_CALLS] [5]", "[TOOL_CALLS] [5]", []),
    ("mistral", "[TOOL_CALLS] [", "[TOOL_CALLS] [", []),
    ("mistral", "[TOOL_CALLS]", "[TOOL_CALLS]", []),
    ("mistral", "[TOOL_CALLS]name", "[TOOL_CALLS]name", []),
    ("mistral", f"[TOOL_CALLS][{BROKEN}x[TOOL_CALLS][{G}]", None, [("f", '{"a": ]x'), G_CALL]),
    ("array", f"[{F}, {G}]", None, [F_CALL, G_CALL]),
    ("array", f" [ {F} , {G}", None, [F_CALL, G_CALL]),
    ("array", '[{"name": "f"', '[{"name": "f"', []),
    ("array", "text", "text", []),
    ("named", '{"a": 1}', None, [("f", '{"a": 1}')]),
    ("named", "", None, []),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_a_text_is_content_and_calls(form: str, text: str, content: str | None, calls: list[tuple[str, str]]) -> None:
    for pieces in ([text], list(text)):
        parsed = message(PARSERS[form](), pieces)
        assert (parsed.content, [(call.name, call.arguments) for call in parsed.tool_calls]) == (content or "", calls)


WORDS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[", "]", "{", "}"),
    *('"', "\\", ",", ":", ";", " ", "\n", "a", "5", "<", "f", F, G, BROKEN, F[:-1], F[:20], F[20:], '{"a": 1}'),
    *('{"name": ', '"arguments": ', '"f"', '"parameters": ', '{"name": "f", "arguments": {', "true", "é", "]}"),
]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=14).map("".join)


@pytest.mark.parametrize("form", PARSERS)
@settings(max_examples=examples(1200), deadline=None)
@given(st.data())
def test_any_split_gives_the_same_messages(form: str, data: st.DataObject) -> None:
    assert_splits_agree(PARSERS[form], data.draw(TEXTS), data)


@pytest.mark.parametrize("form", ["hermes", "llama3_json", "mistral", "array"])
@settings(max_examples=examples(800), deadline=None)
@given(st.data())
def test_nothing_is_lost_and_nothing_doubled(form: str, data: st.DataObject) -> None:
    """All content, in order, is in the text; what is missing are calls and what stands around their arguments."""
    text = data.draw(TEXTS)
    parsed = message(PARSERS[form](), [text])
    if not parsed.tool_calls:
        assert parsed.content == text
    rest = iter(text)
    assert all(character in rest for character in parsed.content)
    letters = re.sub(r"\W", "", text.replace("\\u00e9", "é"))
    for call in parsed.tool_calls:
        for word in re.findall(r"\w+", call.arguments.replace("\\u00e9", "é")):
            assert word in letters


@pytest.mark.parametrize(
    ("form", "before", "after"),
    [("hermes", "<tool_call>\n", "\n</tool_call>"), ("llama3_json", "", ""), ("mistral", "[TOOL_CALLS][", "]")],
)
def test_the_name_comes_first_and_arguments_go_out_as_they_come(form: str, before: str, after: str) -> None:
    parser = TOOL_PARSERS[form]()
    assert parser.feed(before + '{"name": "f", "arguments": ') == []
    first, part = (delta.tool_call for delta in parser.feed('{"a": "so'))
    assert first is not None
    assert (first.index, first.name, first.arguments) == (0, "f", "")
    assert first.id
    assert part == ToolCallDelta(0, arguments='{"a": "so')
    assert parser.feed("me text") == [Delta(tool_call=ToolCallDelta(0, arguments="me text"))]
    assert parser.feed('"}') == [Delta(tool_call=ToolCallDelta(0, arguments='"}'))]
    assert parser.feed("}" + after) == []
    assert parser.finish() == []


@pytest.mark.parametrize("form", ["hermes", "mistral"])
def test_text_that_is_part_of_no_marker_goes_out_at_once(form: str) -> None:
    parser = TOOL_PARSERS[form]()
    marker = parser.begin_marker
    assert parser.feed("A word") == [Delta(content="A word")]
    assert parser.feed(" and\n") == [Delta(content=" and")]
    assert parser.feed(marker[:4]) == []
    assert parser.feed("!") == [Delta(content=f"\n{marker[:4]}!")]


def test_ids_are_of_the_form_that_templates_take() -> None:
    assert re.fullmatch(r"[a-zA-Z0-9]{9}", TOOL_PARSERS["mistral"]().new_id())
    assert re.fullmatch(r"call_[0-9a-f]{24}", TOOL_PARSERS["hermes"]().new_id())
    parsed = parse(TOOL_PARSERS["mistral"](), "[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{}")
    assert parsed.tool_calls[0].id == "abcdefghi"


def test_long_texts_cost_time_in_proportion_to_their_length() -> None:
    """Each character is scanned a bounded number of times, also where calls turn out to be none."""
    for text in ("<tool_call>" * 20_000, '<tool_call>{"' * 20_000, "<tool_call>" + "[" * 100_000):
        assert message(TOOL_PARSERS["hermes"](), [text]).content == text
    assert message(TOOL_PARSERS["llama3_json"](), ['{"name": ' + "[" * 100_000 + "]" * 100_000 + "}"]).content


def test_reasoning_comes_before_content_and_calls() -> None:
    text = f"<think>\nI call <tool_call>.\n</think>\n\nWait.\n<tool_call>\n{F}\n</tool_call>"
    for pieces in ([text], list(text)):
        parsed = message(Chain(ReasoningParser(), TOOL_PARSERS["hermes"]()), pieces)
        assert (parsed.reasoning, parsed.content) == ("I call <tool_call>.", "Wait.")
        assert [(call.name, call.arguments) for call in parsed.tool_calls] == [F_CALL]


@settings(max_examples=examples(200), deadline=None)
@given(st.dictionaries(st.text(), st.recursive(st.none() | st.booleans() | st.text(), st.lists)), st.data())
def test_any_arguments_arrive_as_they_were_written(arguments: dict[str, object], data: st.DataObject) -> None:
    written = json.dumps(arguments, ensure_ascii=data.draw(st.booleans()))
    call = f'{{"name": "f", "arguments": {written}}}'
    for form, text in (
        ("hermes", f"<tool_call>\n{call}\n</tool_call>"),
        ("llama3_json", call),
        ("array", f"[{call}]"),
        ("mistral", f"[TOOL_CALLS][{call}]"),
        ("mistral", f"[TOOL_CALLS]f{written}"),
    ):
        parsed = message(PARSERS[form](), [text])
        assert parsed.content == ""
        assert parsed.tool_calls[0].arguments == written
