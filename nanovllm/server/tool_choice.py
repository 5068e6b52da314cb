"""tool_choice "required" and a function's name: the JSON schema that enforces them, and the parser of its output."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nanovllm.errors import InvalidArgumentError
from nanovllm.server.tool_parsers.call_array import CallArrayParser
from nanovllm.server.tool_parsers.named_call import NamedCallParser
from nanovllm.server.tool_parsers.tool_parser import ToolParser

__all__ = ["forced_tool_parser", "forced_tool_schema"]

Tools = Sequence[Mapping[str, Any]]
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_VALUES = {"const", "default", "enum", "examples"}  # keywords whose values are no schemas


def forced_tool_schema(tools: Tools, name: str | None, *, parallel_tool_calls: bool = True) -> dict[str, Any]:
    """Returns the schema of an output that calls tools: an array of calls, or the arguments of the function `name`.

    tools: as OpenAI writes them, {"type": "function", "function": {"name": …, "parameters": …}}.
    Raises InvalidArgumentError if no tool has that name, or there is none.
    """
    functions = [tool["function"] for tool in tools]
    if name is not None:
        for function in functions:
            if function["name"] == name:
                return _parameters(function, "")
        names = ", ".join(function["name"] for function in functions)
        raise InvalidArgumentError("tool_choice", name, f"the name of one of the tools ({names:.200})")
    if not functions:
        raise InvalidArgumentError("tools", [], "one or more tools with tool_choice='required'")
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "parameters": _parameters(function, f"/items/anyOf/{index}/properties/parameters"),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for index, function in enumerate(functions)
    ]
    schema = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    return schema if parallel_tool_calls else {**schema, "maxItems": 1}


def forced_tool_parser(name: str | None) -> ToolParser:
    """Returns the parser of an output that `forced_tool_schema` with the same name enforces."""
    return CallArrayParser() if name is None else NamedCallParser(name)


def _parameters(function: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Returns a function's schema, with references that hold at `place`, a JSON pointer, in a larger schema."""
    try:
        schema: dict[str, Any] = json.loads(json.dumps(function.get("parameters") or _NO_PARAMETERS))
    except RecursionError:
        raise InvalidArgumentError("tools", function["name"], "nested less deeply") from None
    to_visit: list[Any] = [schema]
    while to_visit:
        part = to_visit.pop()
        if isinstance(part, list):
            to_visit += part
        elif isinstance(part, dict):
            reference = part.get("$ref")
            if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
                part["$ref"] = f"#{place}{reference[1:]}"
            to_visit += [value for keyword, value in part.items() if keyword not in _VALUES]
    return schema
