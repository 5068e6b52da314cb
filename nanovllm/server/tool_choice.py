"""tool_choice "required" and a named tool: what structured outputs enforce, and how their text is read.

For a named tool the text is the JSON of its arguments. For "required" it is a list of calls, each with the name of a
tool and its parameters.
"""

from __future__ import annotations

import json
from typing import Any

from nanovllm.sampling_params import StructuredOutputsParams
from nanovllm.server.errors import invalid
from nanovllm.server.parsing import TextParser
from nanovllm.server.protocol.chat import ChatCompletionRequest, FunctionDefinition, NamedTool
from nanovllm.server.tool_parsers.call_array import RequiredCallsParser
from nanovllm.server.tool_parsers.named_call import NamedCallParser

_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_VALUES = {"const", "default", "enum", "examples"}  # keywords whose values are no schemas


def forced_schema(body: ChatCompletionRequest) -> StructuredOutputsParams:
    """Returns what the output must look like for a request that must call a tool."""
    functions = [tool.function for tool in body.tools or ()]
    schema: dict[str, Any]
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        schema = next(_parameters(each, "") for each in functions if each.name == name)
    else:
        calls = [_call(each, f"/items/anyOf/{index}") for index, each in enumerate(functions)]
        schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1}
        if body.parallel_tool_calls is False:
            schema["maxItems"] = 1
    return StructuredOutputsParams(json=schema, disable_any_whitespace=True)


def forced_parser(body: ChatCompletionRequest) -> TextParser:
    """Returns the parser of an output that `forced_schema` enforces, which may be cut off."""
    choice = body.tool_choice
    return NamedCallParser(choice.function.name) if isinstance(choice, NamedTool) else RequiredCallsParser()


def _call(function: FunctionDefinition, place: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": function.name},
            "parameters": _parameters(function, f"{place}/properties/parameters"),
        },
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _parameters(function: FunctionDefinition, place: str) -> dict[str, Any]:
    """Returns a function's schema with the references that it needs at `place`, a JSON pointer, in a larger schema."""
    try:
        given = {"type": "object", **function.parameters} if function.parameters else _NO_PARAMETERS
        schema: dict[str, Any] = json.loads(json.dumps(given))
    except RecursionError:
        raise invalid("tools", "tools has a schema that is nested too deeply.") from None
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
