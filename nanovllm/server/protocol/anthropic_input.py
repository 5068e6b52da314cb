"""Turns a request of Anthropic's Messages API into one of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanovllm.server.errors import invalid
from nanovllm.server.protocol.anthropic import (
    AnthropicMessage,
    AnthropicTool,
    AnthropicToolChoice,
    Block,
    CountTokensRequest,
    MessagesRequest,
)

Message = dict[str, Any]

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_body(request: CountTokensRequest) -> dict[str, Any]:
    """Returns the body of the chat request that asks for the same. Raises ApiError for what is not supported."""
    if request.mcp_servers:
        raise invalid("mcp_servers", "mcp_servers must be empty: this server runs no tools.")
    messages = [] if request.system is None else [_message("system", _texts(request.system, "system"))]
    for index, message in enumerate(request.messages):
        messages += _messages_of(message, f"messages.{index}.content")
    is_continued = request.messages[-1].role == "assistant"
    thinks = request.thinking is not None and request.thinking.type != "disabled"
    body: dict[str, Any] = {
        "model": request.model,
        "messages": _joined(messages),
        "add_generation_prompt": not is_continued,
        "continue_final_message": is_continued,
        "chat_template_kwargs": {"enable_thinking": thinks, **(request.chat_template_kwargs or {})},
    }
    if request.tools:
        body["tools"] = [_tool(tool, index) for index, tool in enumerate(request.tools)]
        body |= _tool_choice(request.tool_choice)
    if request.output_config is not None and request.output_config.format is not None:
        schema = {"name": "output", "schema": request.output_config.format.schema_}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(request, MessagesRequest):
        body |= _sampling(request)
    return body


def _sampling(request: MessagesRequest) -> dict[str, Any]:
    if request.container is not None:
        raise invalid("container", "container must be absent: this server runs no tools.")
    return {
        "max_tokens": request.max_tokens,
        "stream": request.stream,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stop": request.stop_sequences,
    }


def _tool(tool: AnthropicTool, index: int) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise invalid(f"tools.{index}.type", f"tools.{index}.type must be 'custom': this server runs no tools.")
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _tool_choice(choice: AnthropicToolChoice | None) -> dict[str, Any]:
    if choice is None:
        return {"tool_choice": "auto"}
    if choice.type == "tool" and choice.name is None:
        raise invalid("tool_choice.name", "tool_choice.name is required with type 'tool'.")
    named = {"type": "function", "function": {"name": choice.name}}
    parallel = not choice.disable_parallel_tool_use
    return {"tool_choice": _CHOICES.get(choice.type, named), "parallel_tool_calls": parallel}


def _messages_of(message: AnthropicMessage, field: str) -> list[Message]:
    """Returns the chat messages of one turn: results of tools are messages of their own."""
    if isinstance(message.content, str):
        return [_message(message.role, message.content)]
    if message.role == "assistant":
        return [_assistant(message.content, field)]
    messages = []
    for index, block in enumerate(message.content):
        at = f"{field}.{index}"
        if block.get("type") == "tool_result":
            content = _texts(block.get("content", ""), f"{at}.content")
            messages.append({"role": "tool", "tool_call_id": _text(block, "tool_use_id", at), "content": content})
        else:
            messages.append(_message(message.role, _texts([block], at)))
    return messages


def _assistant(blocks: Sequence[Block], field: str) -> Message:
    message: Message = {"role": "assistant", "content": None}
    texts, calls, thoughts = [], [], []
    for index, block in enumerate(blocks):
        at = f"{field}.{index}"
        match block.get("type"):
            case "tool_use":
                arguments = block.get("input", {})
                if not isinstance(arguments, dict):
                    raise invalid(f"{at}.input", f"{at}.input must be an object.")
                function = {"name": _text(block, "name", at), "arguments": arguments}
                calls.append({"id": _text(block, "id", at), "type": "function", "function": function})
            case "thinking":
                thoughts.append(_text(block, "thinking", at))
            case "redacted_thinking":
                pass  # nothing that a model could read
            case _:
                texts.append(_texts([block], at))
    if texts:
        message["content"] = "".join(texts)
    if calls:
        message["tool_calls"] = calls
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return message


def _texts(content: object, field: str) -> str:
    """Returns the text of a content: a text, or blocks of type text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(field, f"{field} must be a text or a list of blocks.")
    texts = []
    for index, block in enumerate(content):
        if not isinstance(block, dict) or block.get("type") != "text":
            at = f"{field}.{index}" if len(content) > 1 else field
            raise invalid(at, f"{at} must be a block of type 'text': other types are not supported.")
        texts.append(_text(block, "text", field))
    return "\n".join(texts)


def _text(block: Block, name: str, field: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise invalid(f"{field}.{name}", f"{field}.{name} must be a text.")
    return value


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Returns the messages with consecutive ones of the user as one, since many templates want roles to alternate."""
    joined: list[Message] = []
    for message in messages:
        if joined and message["role"] == joined[-1]["role"] == "user":
            joined[-1] = _message("user", f"{joined[-1]['content']}\n{message['content']}")
        else:
            joined.append(message)
    return joined
