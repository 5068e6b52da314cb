"""tool_choice "required" and a named tool: what structured outputs enforce, and how their text is read.

For a named tool the text is the JSON of its arguments. For "required" it is a list of calls, each with the name of a
tool and its parameters.
"""

from __future__ import annotations

import json
from typing import Any

from nanovllm.sampling_params import StructuredOutputsParams
from nanovllm.server.parsing import Delta, ToolCallDelta
from nanovllm.server.protocol.chat import ChatCompletionRequest, FunctionDefinition, NamedTool

_ANY_OBJECT: dict[str, Any] = {"type": "object", "properties": {}}
_PARAMETERS = '"parameters": '  # what `disable_any_whitespace` writes before the arguments
_NAME = '{"name": '


def forced_schema(body: ChatCompletionRequest) -> StructuredOutputsParams:
    """Returns what the output must look like for a request that must call a tool."""
    functions = [tool.function for tool in body.tools or ()]
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        return StructuredOutputsParams(json=next(_parameters(each) for each in functions if each.name == name))
    calls: dict[str, Any] = {"type": "array", "items": {"anyOf": [_call(each) for each in functions]}, "minItems": 1}
    if body.parallel_tool_calls is False:
        calls["maxItems"] = 1
    return StructuredOutputsParams(json=_with_definitions(calls, functions), disable_any_whitespace=True)


def _parameters(function: FunctionDefinition) -> dict[str, Any]:
    return function.parameters or _ANY_OBJECT


def _call(function: FunctionDefinition) -> dict[str, Any]:
    parameters = {name: value for name, value in _parameters(function).items() if name not in ("$defs", "definitions")}
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _with_definitions(calls: dict[str, Any], functions: list[FunctionDefinition]) -> dict[str, Any]:
    """Adds the definitions of all tools, which references look for at the top."""
    for key in ("$defs", "definitions"):
        found = [_parameters(each).get(key) for each in functions]
        merged = {name: schema for each in found if isinstance(each, dict) for name, schema in each.items()}
        if merged:
            calls[key] = merged
    return calls


class NamedCall:
    """Takes all text as the arguments of one call."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def feed(self, text: str) -> list[Delta]:
        name, self._name = self._name, None
        return [Delta(tool_call=ToolCallDelta(0, name, text))]

    def finish(self) -> list[Delta]:
        return []


class RequiredCalls:
    """Reads a list `[{"name": "f", "parameters": {…}}, …]`. Its text may be cut off anywhere."""

    def __init__(self) -> None:
        self._index = -1
        self._held = ""  # text before the arguments of a call
        self._depth = 0  # of braces and brackets inside the arguments; 0: outside
        self._in_string = self._escaped = False

    def feed(self, text: str) -> list[Delta]:
        deltas: list[Delta] = []
        while text:
            if self._depth:
                arguments, text = self._split_arguments(text)
                deltas.append(Delta(tool_call=ToolCallDelta(self._index, None, arguments)))
                continue
            self._held, text = self._held + text, ""
            head, found, rest = self._held.partition(_PARAMETERS)
            if found and rest:
                self._index += 1
                self._held, text, self._depth = "", rest[1:], 1
                name = json.loads(head[head.index(_NAME) + len(_NAME) :].rstrip().removesuffix(","))
                deltas.append(Delta(tool_call=ToolCallDelta(self._index, name, rest[0])))
        return deltas

    def _split_arguments(self, text: str) -> tuple[str, str]:
        """Returns the part of `text` that belongs to the arguments, and the rest."""
        for at, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return text[: at + 1], text[at + 1 :]
        return text, ""

    def finish(self) -> list[Delta]:
        return []
