"""The text of forced tool calls: any split of it into pieces gives the same message."""

from __future__ import annotations

import itertools
import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from nanovllm.server.parsing import ParsedMessage, TextParser, parse
from nanovllm.server.protocol.chat import ChatCompletionRequest
from nanovllm.server.tool_choice import NamedCall, RequiredCalls, forced_schema
from tests.properties import examples

TEXTS = st.text(alphabet='{}[]",\\ab:é\n', max_size=8) | st.sampled_from(['"parameters": {', '{"name": "x"'])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.tuples(TEXTS, st.dictionaries(TEXTS, VALUES, max_size=3)), min_size=1, max_size=3)


def fed(parser: TextParser, text: str, cuts: list[int]) -> ParsedMessage:
    """The message of a text in pieces that end at `cuts`."""
    message = ParsedMessage()
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for start, end in itertools.pairwise(bounds):
        message.add(parser.feed(text[start:end]))
    message.add(parser.finish())
    return message


@given(CALLS, st.lists(st.integers(0, 10**6)), st.booleans())
@settings(max_examples=examples(1000), deadline=None)
def test_required_calls(calls: list[tuple[str, dict[str, Any]]], cuts: list[int], escapes: bool) -> None:
    text = json.dumps([{"name": name, "parameters": given} for name, given in calls], ensure_ascii=escapes)
    message = fed(RequiredCalls(), text, cuts)
    assert message == parse(RequiredCalls(), text)
    assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == calls
    assert (message.content, message.reasoning) == ("", "")


@given(CALLS, st.lists(st.integers(0, 10**6)), st.integers(0, 10**6))
@settings(max_examples=examples(1000), deadline=None)
def test_required_calls_that_are_cut_off(calls: list[tuple[str, dict[str, Any]]], cuts: list[int], length: int) -> None:
    text = json.dumps([{"name": name, "parameters": given} for name, given in calls])
    whole = parse(RequiredCalls(), text).tool_calls
    part = fed(RequiredCalls(), text[: length % len(text)], cuts).tool_calls
    assert [call.name for call in part] == [call.name for call in whole[: len(part)]]
    for found, complete in zip(part, whole, strict=False):
        assert complete.arguments.startswith(found.arguments)


@given(st.dictionaries(TEXTS, VALUES, max_size=3), st.lists(st.integers(0, 10**6)))
@settings(max_examples=examples(200), deadline=None)
def test_a_named_call(arguments: dict[str, Any], cuts: list[int]) -> None:
    text = json.dumps(arguments)
    (call,) = fed(NamedCall("f"), text, cuts).tool_calls
    assert (call.name, call.arguments) == ("f", text)


def request(tools: list[dict[str, Any]], choice: Any) -> ChatCompletionRequest:
    messages = [{"role": "user", "content": "a"}]
    return ChatCompletionRequest.model_validate({"messages": messages, "tools": tools, "tool_choice": choice})


def schema_of(tools: list[dict[str, Any]], choice: Any) -> Any:
    wanted = forced_schema(request(tools, choice))
    assert isinstance(wanted.json, str)
    return json.loads(wanted.json)


POINT = {"$defs": {"n": {"type": "integer"}}, "type": "object", "properties": {"x": {"$ref": "#/$defs/n"}}}
TOOLS = [
    {"type": "function", "function": {"name": "move", "parameters": POINT}},
    {"type": "function", "function": {"name": "stop"}},
]


def test_definitions_stay_where_references_look_for_them() -> None:
    schema = schema_of(TOOLS, "required")
    assert schema["$defs"] == POINT["$defs"]
    move, stop = schema["items"]["anyOf"]
    assert move["properties"]["parameters"] == {"type": "object", "properties": POINT["properties"]}
    assert stop["properties"]["name"] == {"const": "stop"}


@pytest.mark.parametrize("name", ["move", "stop"])
def test_a_named_tool_takes_its_own_parameters(name: str) -> None:
    schema = schema_of(TOOLS, {"type": "function", "function": {"name": name}})
    assert schema.get("properties") == (POINT["properties"] if name == "move" else {})
    assert schema["type"] == "object"
