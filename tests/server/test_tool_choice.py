"""The schemas of forced tool calls allow exactly the calls, and their parsers read them."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from nanovllm import LLM, SamplingParams, StructuredOutputsParams
from nanovllm.errors import InvalidArgumentError
from nanovllm.server.tool_choice import forced_tool_parser, forced_tool_schema
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
    schema = forced_tool_schema(TOOLS, None)
    assert jsonschema.Draft202012Validator(schema).is_valid(calls) is allowed


def test_without_parallel_calls_one_is_allowed() -> None:
    schema = forced_tool_schema(TOOLS, None, parallel_tool_calls=False)
    assert not jsonschema.Draft202012Validator(schema).is_valid([call("now", {})] * 2)


def test_a_name_asks_for_its_parameters() -> None:
    assert forced_tool_schema(TOOLS, "plant") == TREE


@pytest.mark.parametrize(("tools", "name"), [(TOOLS, "other"), ([], None)])
def test_a_tool_that_is_not_there_is_refused(tools: list[dict[str, Any]], name: str | None) -> None:
    with pytest.raises(InvalidArgumentError, match="tool"):
        forced_tool_schema(tools, name)


def test_a_schema_that_is_nested_too_deeply_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"not": deep}
    with pytest.raises(InvalidArgumentError, match="nested less deeply"):
        forced_tool_schema([tool("deep", deep)], None)


def test_the_model_writes_what_the_parser_reads() -> None:
    leaf = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    tools = [tool("f", {**leaf, "additionalProperties": False})]
    with LLM("tiny", device="cpu", max_num_seqs=4, num_kvcache_blocks=64) as llm:
        for name in (None, "f"):
            schema = forced_tool_schema(tools, name, parallel_tool_calls=False)
            grammar = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
            params = SamplingParams(temperature=1, seed=0, max_tokens=200, structured_outputs=grammar)
            text = llm.generate("Call f.", params, use_tqdm=False)[0].outputs[0].text
            parsed = message(forced_tool_parser(name), list(text))
            assert parsed.content is None
            assert [(each.name, set(json.loads(each.arguments))) for each in parsed.tool_calls] == [("f", {"ok"})]
