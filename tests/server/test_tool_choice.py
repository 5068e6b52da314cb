"""The schemas of forced tool calls allow exactly the calls, and their parsers read them."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.server.errors import ApiError
from nanovllm.server.protocol.chat import ChatCompletionRequest
from nanovllm.server.tool_choice import forced_parser, forced_schema
from tests.server.splits import message

TREE = {
    "type": "object",
    "properties": {"child": {"$ref": "#"}, "kind": {"$ref": "#/$defs/kind"}},
    "required": ["kind"],
    "additionalProperties": False,
    "$defs": {"kind": {"enum": ["leaf", {"$ref": "#"}]}},
}


def tool(name: str, parameters: dict[str, Any] | None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("now", None), tool("plant", TREE)]


def request(tools: list[dict[str, Any]], name: str | None = None, **fields: Any) -> ChatCompletionRequest:
    choice = "required" if name is None else {"type": "function", "function": {"name": name}}
    messages = [{"role": "user", "content": "Call."}]
    return ChatCompletionRequest.model_validate({"messages": messages, "tools": tools, "tool_choice": choice, **fields})


def schema_of(body: ChatCompletionRequest) -> Any:
    schema = forced_schema(body).json
    assert isinstance(schema, str)
    return json.loads(schema)


def call(name: str, parameters: object) -> dict[str, object]:
    return {"name": name, "parameters": parameters}


@pytest.mark.parametrize(
    ("calls", "allowed"),
    [
        ([call("now", {})], True),
        ([call("plant", {"kind": "leaf", "child": {"kind": {"$ref": "#"}}}), call("now", {})], True),
        ([], False),
        ([call("other", {})], False),
        ([call("now", {"a": 1})], False),
        ([call("plant", {})], False),
        ([call("plant", {"kind": "leaf", "child": {"kind": "twig"}})], False),
    ],
)
def test_required_allows_calls_of_the_tools(calls: list[object], allowed: bool) -> None:
    schema = schema_of(request(TOOLS))
    assert jsonschema.Draft202012Validator(schema).is_valid(calls) is allowed


def test_without_parallel_calls_one_is_allowed() -> None:
    schema = schema_of(request(TOOLS, parallel_tool_calls=False))
    assert not jsonschema.Draft202012Validator(schema).is_valid([call("now", {})] * 2)


def test_a_name_asks_for_its_parameters() -> None:
    assert schema_of(request(TOOLS, "plant")) == TREE


def test_a_schema_that_is_nested_too_deeply_is_refused() -> None:
    deep: dict[str, Any] = {}
    body = request([tool("deep", {"properties": deep})])
    for _ in range(100_000):
        deep["not"] = deep = {}
    with pytest.raises(ApiError, match="nested too deeply"):
        forced_schema(body)


ARGUMENTS = '{"kind": "leaf", "child": {"kind": "\\\\n}"}}'


def test_calls_that_are_cut_off_are_calls_as_far_as_they_go() -> None:
    """At any character, however the text arrives."""
    text, places = "[", []
    for name, arguments in (("plant", ARGUMENTS), ("now", "{}")):
        text += f'{{"name": "{name}"'
        named = len(text)
        text += ', "parameters": '
        places.append((name, named, slice(len(text), len(text) + len(arguments))))
        text += f"{arguments}}}, "
    text = text.removesuffix(", ") + "]"
    for length in range(1, len(text) + 1):
        cut = text[:length]
        parsed = message(forced_parser(request(TOOLS)), [cut])
        assert message(forced_parser(request(TOOLS)), list(cut)) == parsed
        calls = [(call.name, call.arguments) for call in parsed.tool_calls]
        assert calls == [(name, cut[arguments]) for name, named, arguments in places if length >= named]
        assert parsed.content == ""


def test_the_arguments_of_a_named_tool_that_are_cut_off() -> None:
    for length in range(1, len(ARGUMENTS) + 1):
        (call,) = message(forced_parser(request(TOOLS, "plant")), [ARGUMENTS[:length]]).tool_calls
        assert (call.name, call.arguments) == ("plant", ARGUMENTS[:length])


def test_the_model_writes_what_the_parser_reads() -> None:
    leaf = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    tools = [tool("f", {**leaf, "additionalProperties": False})]
    with LLM("tiny", device="cpu", max_num_seqs=4, num_kvcache_blocks=64) as llm:
        for name in (None, "f"):
            body = request(tools, name, parallel_tool_calls=False)
            params = SamplingParams(temperature=1, seed=0, max_tokens=200, structured_outputs=forced_schema(body))
            text = llm.generate("Call f.", params, use_tqdm=False)[0].outputs[0].text
            parsed = message(forced_parser(body), list(text))
            assert parsed.content == ""
            assert [(each.name, set(json.loads(each.arguments))) for each in parsed.tool_calls] == [("f", {"ok"})]
