"""Answers of the Responses API: items of output, and the events of a stream."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from nanovllm.outputs import CompletionOutput
from nanovllm.server.errors import ApiError, invalid
from nanovllm.server.parsing import Delta
from nanovllm.server.protocol.base import Usage
from nanovllm.server.protocol.responses import ResponsesRequest

Event = dict[str, Any]

# By the kind of an item: the prefix of its id, and the event of its text.
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_TEXT_EVENTS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


class _Item:
    """One item of the output, while it grows. logprobs: those of the text of a message."""

    def __init__(self, kind: str, index: int, name: str = "", call_id: str | None = None) -> None:
        self.kind, self.index = kind, index
        self.id = f"{_PREFIXES[kind]}_{uuid.uuid4().hex}"
        self._name, self._call_id = name, call_id
        self.texts: list[str] = []
        self.logprobs: list[Any] = []

    @property
    def place(self) -> Event:
        """What the events of the item's text have in common."""
        place: Event = {"item_id": self.id, "output_index": self.index}
        return place if self.kind == "function_call" else {**place, "content_index": 0}

    @property
    def part(self) -> Event:
        """The part of the content that has the text."""
        text = "".join(self.texts)
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs}

    def value(self, status: str) -> Event:
        """Returns the item as it is in the output."""
        item: Event = {"type": self.kind, "id": self.id, "status": status}
        if self.kind == "function_call":
            return {**item, "call_id": self._call_id, "name": self._name, "arguments": "".join(self.texts)}
        content = [] if status == "in_progress" else [self.part]
        return {**item, "content": content, **({"role": "assistant"} if self.kind == "message" else {"summary": []})}


class ResponseEvents:
    """The events of one response, which is a sequence of items. Each method returns the events that come next."""

    def __init__(self, response_id: str, model: str, created_at: float, request: ResponsesRequest) -> None:
        self._response = _empty_response(response_id, model, created_at, request)
        self._num_events = 0
        self._item: _Item | None = None  # the one that grows
        self._call = -1  # the index of the tool call that the item is
        self._num_reasoning_tokens = 0
        self._logprobs: list[Any] = []  # of tokens whose text has not come yet

    def start(self) -> list[Event]:
        """The response begins."""
        return [
            self._event("response.created", response=dict(self._response)),
            self._event("response.in_progress", response=dict(self._response)),
        ]

    def add(self, deltas: Sequence[Delta], num_tokens: int = 0, logprobs: Sequence[Any] = ()) -> list[Event]:
        """The response goes on. num_tokens, logprobs: of the tokens that made the deltas."""
        if deltas and all(delta.reasoning for delta in deltas):
            self._num_reasoning_tokens += num_tokens
        events = [event for delta in deltas for event in self._add(delta)]
        if self._item is None or self._item.kind == "message":
            self._logprobs += logprobs
        if self._item is not None and events and events[-1]["type"] == "response.output_text.delta":
            events[-1]["logprobs"], self._logprobs = self._logprobs, []
            self._item.logprobs += events[-1]["logprobs"]
        return events

    def finish(self, completion: CompletionOutput, usage: Usage) -> list[Event]:
        """The response ends. completion: its last output."""
        is_complete = completion.finish_reason == "stop"
        status = "completed" if is_complete else "incomplete"
        events = self._close(status)
        self._response["status"] = status
        if not is_complete:
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        self._response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }
        return [*events, self._event(f"response.{status}", response=self._response)]

    def fail(self, error: ApiError) -> list[Event]:
        """The response ends with an error."""
        events = self._close("incomplete")
        self._response |= {"status": "failed", "error": {"code": "server_error", "message": error.message}}
        return [*events, self._event("response.failed", response=self._response)]

    def _add(self, delta: Delta) -> Iterable[Event]:
        call = delta.tool_call
        if call is not None:
            if call.name is not None:
                yield from self._open("function_call", call.name, call.id)
            if call.arguments:
                yield self._text(call.arguments)
        else:
            kind, text = ("reasoning", delta.reasoning) if delta.reasoning else ("message", delta.content)
            if self._item is None or self._item.kind != kind:
                yield from self._open(kind)
            yield self._text(text)

    def _open(self, kind: str, name: str = "", call_id: str | None = None) -> list[Event]:
        events = self._close("completed")
        item = self._item = _Item(kind, len(self._response["output"]), name, call_id)
        added = self._event("response.output_item.added", output_index=item.index, item=item.value("in_progress"))
        events.append(added)
        if kind != "function_call":
            events.append(self._event("response.content_part.added", **item.place, part=item.part))
        return events

    def _text(self, text: str) -> Event:
        assert self._item is not None
        self._item.texts.append(text)
        extra: Event = {"logprobs": []} if self._item.kind == "message" else {}
        return self._event(f"{_TEXT_EVENTS[self._item.kind]}.delta", **self._item.place, delta=text, **extra)

    def _close(self, status: str) -> list[Event]:
        item, self._item = self._item, None
        if item is None:
            return []
        text = {"arguments" if item.kind == "function_call" else "text": "".join(item.texts)}
        extra: Event = {}
        if item.kind == "message":
            item.logprobs += self._logprobs
            extra = {"logprobs": item.logprobs}
        self._logprobs = []
        events = [self._event(f"{_TEXT_EVENTS[item.kind]}.done", **item.place, **text, **extra)]
        if item.kind != "function_call":
            events.append(self._event("response.content_part.done", **item.place, part=item.part))
        value = item.value(status)
        self._response["output"].append(value)
        return [*events, self._event("response.output_item.done", output_index=item.index, item=value)]

    def _event(self, kind: str, **fields: Any) -> Event:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}


def _empty_response(response_id: str, model: str, created_at: float, request: ResponsesRequest) -> dict[str, Any]:
    """Returns the response before its first item. It repeats the request's settings, as OpenAI's does."""
    text = request.text.model_dump(by_alias=True, exclude_none=True) if request.text is not None else {}
    repeated = {
        "instructions": request.instructions,
        "metadata": request.metadata or {},
        "reasoning": None if request.reasoning is None else request.reasoning.model_dump(exclude_none=True),
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "user": request.user,
    }
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "max_output_tokens": request.max_output_tokens,
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "service_tier": "default",
        "store": False,
        "temperature": request.temperature,
        "top_logprobs": request.top_logprobs or 0,
        "top_p": request.top_p,
        "truncation": "disabled",
        "usage": None,
        **{field: _json(field, value) for field, value in repeated.items()},
    }


def _json(field: str, value: object) -> orjson.Fragment:
    """Returns a value of the request as JSON: orjson refuses large integers and halves of surrogate pairs."""
    try:
        without_nan = json.loads(json.dumps(value), parse_constant=lambda constant: None)
        return orjson.Fragment(json.dumps(without_nan))
    except RecursionError:
        raise invalid(field, f"{field} is nested too deeply.") from None
