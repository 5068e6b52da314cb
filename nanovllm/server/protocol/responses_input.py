"""Turns a request of the Responses API into one of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanovllm.server.errors import invalid
from nanovllm.server.protocol.responses import Item, ResponsesRequest

Message = dict[str, Any]

LOGPROBS = "message.output_text.logprobs"  # of `include`
_INCLUDES = (LOGPROBS, "reasoning.encrypted_content")  # reasoning comes back as plain text, which serves the same end
_NOT_STORED = "This server keeps nothing between requests: send the conversation as `input`."
# Fields that ask for what there is not, unless they have one of these values.
_ONLY: dict[str, tuple[tuple[object, ...], str]] = {
    "background": ((None, False), "Requests in the background are not supported."),
    "conversation": ((None,), _NOT_STORED),
    "previous_response_id": ((None,), _NOT_STORED),
    "prompt": ((None,), _NOT_STORED),
    "service_tier": ((None, "auto", "default"), "There is one tier of service."),
    "store": ((None, False), _NOT_STORED),
    "truncation": ((None, "disabled"), "Prompts are not truncated."),
}


def chat_body(request: ResponsesRequest) -> dict[str, Any]:
    """Returns the body of the chat request that asks for the same. Raises ApiError for what is not supported."""
    for field, (values, reason) in _ONLY.items():
        _check_value(field, getattr(request, field), values, reason)
    for index, name in enumerate(request.include or ()):
        _check_value(f"include.{index}", name, _INCLUDES, "There is nothing else to include.")
    body: dict[str, Any] = {
        "model": request.model,
        "messages": _messages(request),
        "stream": request.stream,
        "max_completion_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "chat_template_kwargs": dict(request.chat_template_kwargs or {}),
    }
    if LOGPROBS in (request.include or ()):
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    _add_text_options(request, body)
    if request.tools:
        body["tools"] = [_tool(tool, index) for index, tool in enumerate(request.tools)]
        body["tool_choice"] = _tool_choice(request.tool_choice)
        body["parallel_tool_calls"] = request.parallel_tool_calls
    elif request.tool_choice not in (None, "auto", "none"):
        raise invalid("tool_choice", "tool_choice must be 'auto' or 'none' without tools.")
    return body


def _check_value(field: str, value: object, allowed: Sequence[object], reason: str) -> None:
    if not any(value is each or (isinstance(value, str) and value == each) for each in allowed):
        values = ", ".join("null" if each is None else str(each).lower() for each in allowed)
        raise invalid(field, f"{field} must be one of: {values}. {reason}")


def _add_text_options(request: ResponsesRequest, body: dict[str, Any]) -> None:
    if request.text is not None:
        _check_value("text.verbosity", request.text.verbosity, (None, "medium"), "The model chooses its length.")
    if request.text is not None and (form := request.text.format) is not None:
        _check_value("text.format.type", form.type, ("text", "json_object", "json_schema"), "There is no other form.")
        body["response_format"] = {"type": form.type}
        if form.type == "json_schema":
            if form.schema_ is None:
                raise invalid("text.format.schema", "text.format.schema is required with type 'json_schema'.")
            body["response_format"]["json_schema"] = {"name": form.name or "output", "schema": form.schema_}
    if request.reasoning is not None:
        summaries = (None, "auto")
        _check_value("reasoning.summary", request.reasoning.summary, summaries, "Reasoning is not summarised.")
        if request.reasoning.effort is not None:
            body["chat_template_kwargs"].setdefault("enable_thinking", request.reasoning.effort != "none")


def _tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    field = f"tools.{index}"
    _check_value(f"{field}.type", tool.get("type"), ("function",), "This server runs no tools.")
    function = {name: tool.get(name) for name in ("name", "description", "parameters", "strict")}
    _text(tool, "name", field)
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _tool_choice(choice: str | dict[str, Any] | None) -> object:
    if not isinstance(choice, dict):
        return choice or "auto"
    _check_value("tool_choice.type", choice.get("type"), ("function",), "Other tools are not supported.")
    return {"type": "function", "function": {"name": _text(choice, "name", "tool_choice")}}


def _messages(request: ResponsesRequest) -> list[Message]:
    messages: list[Message] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        messages.append({"role": "user", "content": request.input})
        return messages
    if not request.input:
        raise invalid("input", "input must have at least one item.")
    for index, item in enumerate(request.input):
        field = f"input.{index}"
        kind = item.get("type", "message")
        read = _READERS.get(kind) if isinstance(kind, str) else None
        if read is None:
            raise invalid(f"{field}.type", f"{field}.type must be one of: {', '.join(_READERS)}.")
        _append(messages, read(item, field))
    return messages


def _append(messages: list[Message], message: Message) -> None:
    """Adds a message. The reasoning, text and calls of one turn of the assistant become one message."""
    last = messages[-1] if messages else None
    if last is None or last["role"] != message["role"] or message["role"] not in ("assistant", "system"):
        messages.append(message)
    elif message["role"] == "system":
        last["content"] += f"\n{message['content']}"
    else:
        for name, value in message.items():
            if name != "role":
                last[name] = last[name] + value if last.get(name) else value


def _read_message(item: Item, field: str) -> Message:
    roles = ("user", "assistant", "system", "developer")
    _check_value(f"{field}.role", item.get("role"), roles, "There is no other role.")
    role = "system" if item["role"] == "developer" else item["role"]
    return {"role": role, "content": _content(item.get("content"), f"{field}.content")}


def _read_call(item: Item, field: str) -> Message:
    function = {"name": _text(item, "name", field), "arguments": _text(item, "arguments", field)}
    call = {"id": _text(item, "call_id", field), "type": "function", "function": function}
    return {"role": "assistant", "tool_calls": [call]}


def _read_call_output(item: Item, field: str) -> Message:
    content = _content(item.get("output"), f"{field}.output")
    return {"role": "tool", "tool_call_id": _text(item, "call_id", field), "content": content}


def _read_reasoning(item: Item, field: str) -> Message:
    name = "content" if item.get("content") else "summary"
    return {"role": "assistant", "reasoning_content": _content(item.get(name) or [], f"{field}.{name}")}


_READERS: dict[str, Callable[[Item, str], Message]] = {
    "message": _read_message,
    "function_call": _read_call,
    "function_call_output": _read_call_output,
    "reasoning": _read_reasoning,
}
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def _content(content: object, field: str) -> str:
    """Returns the text of a content: a text, or parts that are texts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(field, f"{field} must be a text or a list of parts.")
    texts = []
    for index, part in enumerate(content):
        at = f"{field}.{index}"
        if not isinstance(part, dict):
            raise invalid(at, f"{at} must be an object.")
        _check_value(f"{at}.type", part.get("type"), _TEXTS, "Other parts are not supported.")
        texts.append(_text(part, "text", at))
    return "\n".join(texts)


def _text(item: Mapping[str, Any], name: str, field: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise invalid(f"{field}.{name}", f"{field}.{name} must be a text.")
    return value
