"""Answers of Anthropic's Messages API: blocks of content, the events of a stream, and errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson
from pydantic_core import from_json, to_json

from nanovllm.outputs import CompletionOutput
from nanovllm.server.errors import ApiError
from nanovllm.server.parsing import Delta

Event = dict[str, Any]

_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    499: "api_error",
    503: "overloaded_error",
}
_TEXT_OF = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}


def anthropic_error(error: ApiError) -> Event:
    """Returns the body of an error in Anthropic's form."""
    kind = _ERRORS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


class MessageEvents:
    """The events of one message, which is a sequence of blocks. Each method returns the events that come next."""

    def __init__(self, message_id: str, model: str) -> None:
        self._id, self._model = message_id, model
        self._num_blocks = 0
        self._kind: str | None = None  # of the block that is open
        self._call = -1  # the index of the tool call that the open block is
        self._has_calls = False
        self._usage: dict[str, int] = {}

    def start(self, num_prompt_tokens: int, num_cached_tokens: int) -> list[Event]:
        """The message begins."""
        self._usage = {
            "input_tokens": num_prompt_tokens - num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached_tokens,
            "output_tokens": 0,
        }
        message: Event = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": dict(self._usage),
        }
        return [{"type": "message_start", "message": message}, {"type": "ping"}]

    def add(self, deltas: Iterable[Delta]) -> list[Event]:
        """The message goes on."""
        return [event for delta in deltas for event in self._add(delta)]

    def finish(self, completion: CompletionOutput, num_output_tokens: int) -> list[Event]:
        """The message ends. completion: its last output."""
        self._usage["output_tokens"] = num_output_tokens
        sequence = completion.stop_reason if isinstance(completion.stop_reason, str) else None
        reason = "stop_sequence" if sequence is not None else "tool_use" if self._has_calls else "end_turn"
        if completion.finish_reason == "length":
            reason = "max_tokens"
        end = {"stop_reason": reason, "stop_sequence": sequence}
        return [
            *self._close(),
            {"type": "message_delta", "delta": end, "usage": dict(self._usage)},
            {"type": "message_stop"},
        ]

    def _add(self, delta: Delta) -> list[Event]:
        call = delta.tool_call
        if call is not None:
            events = []
            if call.name is not None:
                self._has_calls, self._call = True, call.index
                block: Event = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
                events = self._open("tool_use", block)
            part = {"type": "input_json_delta", "partial_json": call.arguments}
            return [*events, self._delta(part)]
        if delta.reasoning:
            part = {"type": "thinking_delta", "thinking": delta.reasoning}
            return [*self._continue("thinking", {"thinking": "", "signature": ""}), self._delta(part)]
        part = {"type": "text_delta", "text": delta.content}
        return [*self._continue("text", {"text": ""}), self._delta(part)]

    def _continue(self, kind: str, empty: Event) -> list[Event]:
        return [] if self._kind == kind else self._open(kind, {"type": kind, **empty})

    def _open(self, kind: str, block: Event) -> list[Event]:
        events = self._close()
        self._kind = kind
        return [*events, {"type": "content_block_start", "index": self._num_blocks, "content_block": block}]

    def _delta(self, delta: Event) -> Event:
        return {"type": "content_block_delta", "index": self._num_blocks, "delta": delta}

    def _close(self) -> list[Event]:
        if self._kind is None:
            return []
        # A client keeps the signature of its reasoning, and some drop reasoning without one.
        signature = {"type": "signature_delta", "signature": self._id}
        events = [self._delta(signature)] if self._kind == "thinking" else []
        events.append({"type": "content_block_stop", "index": self._num_blocks})
        self._num_blocks += 1
        self._kind = None
        return events


def message_of(events: Iterable[Event]) -> dict[str, Any]:
    """Returns the message that the events of a stream make up: the answer to a request without `stream`."""
    message: dict[str, Any] = {}
    texts: list[str] = []  # of the block that is open
    for event in events:
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                message["content"].append(dict(event["content_block"]))
                texts = []
            case "content_block_delta":
                delta = event["delta"]
                if delta["type"] == "signature_delta":
                    message["content"][-1]["signature"] = delta["signature"]
                else:
                    texts.append(delta[_TEXT_OF[delta["type"]]])
            case "content_block_stop":
                block = message["content"][-1]
                text = "".join(texts)
                if block["type"] == "tool_use":
                    block["input"] = _input(text)
                else:
                    block[block["type"]] = text
            case "message_delta":
                message |= {**event["delta"], "usage": event["usage"]}
    return message


def _input(arguments: str) -> orjson.Fragment:
    """Returns the arguments of a call as JSON of an object, as far as they go if they are cut off."""
    try:
        value = from_json(arguments or "{}", allow_partial=True)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        value = {"INVALID_JSON": arguments}
    return orjson.Fragment(to_json(value))  # orjson writes no integers above 64 bits
