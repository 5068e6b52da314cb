"""POST /v1/chat/completions: generates the next message of a conversation."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.server.chat import ChatRun, ChoiceUpdate, is_forced
from nanovllm.server.errors import fields_named
from nanovllm.server.exchange import exchange_of
from nanovllm.server.logprobs import chat_logprobs, prompt_logprobs
from nanovllm.server.parsing import Delta, ParsedMessage, ToolCallDelta
from nanovllm.server.protocol.chat import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionRequest,
    MessagePart,
    ToolCallPart,
)
from nanovllm.server.protocol.errors import RESPONSES
from nanovllm.server.responses import DONE, TextEvents, event, json_answer, stream_answer
from nanovllm.server.sampling import given_names
from nanovllm.server.service import service_of

router = APIRouter(responses=RESPONSES)

PATH = "/v1/chat/completions"


@router.post(PATH, responses={200: {"model": ChatCompletion}})
async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
    """Generates the next message of a conversation."""
    names = {**given_names(body), "logprobs": "top_logprobs"}
    if body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    if is_forced(body):
        names["structured_outputs.json"] = "tools"
    with fields_named(names):
        answer = _Answer(await ChatRun.start(service_of(request), exchange_of(request), body, "chatcmpl", PATH))
        if body.stream:
            return await stream_answer(request, answer.events())
        return await json_answer(request, answer.complete())


class _Answer:
    """The answer of a run, whole or in chunks."""

    def __init__(self, run: ChatRun) -> None:
        self._run, self._body = run, run.body
        self._created = int(time.time())
        # Whether the chunks of a choice may differ in their text alone.
        self._may_be_text_alone = not (self._body.return_token_ids or self._body.wants_continuous_usage)

    async def complete(self) -> ChatCompletion:
        choices: list[ChatChoice] = []
        async with aclosing(self._run.updates()) as updates:
            async for update in updates:  # there is one
                choices += [self._choice(each) for each in update]
        answer = self._chunk("chat.completion", choices)
        answer["usage"] = self._run.usage.usage
        self._add_prompt(answer)
        return answer

    async def events(self) -> AsyncGenerator[bytes, None]:
        run, body, begun, texts = self._run, self._body, False, TextEvents("content")
        async with aclosing(run.updates()) as updates:
            async for update in updates:
                if not begun:
                    begun = True
                    yield event(self._first_chunk())
                if self._may_be_text_alone and len(update) == 1 and (text := update[0].text_alone):
                    yield texts.event(update[0].index, text, partial(self._delta_chunk, update))
                elif (chunk := self._delta_chunk(update)) is not None:
                    yield event(chunk)
        if body.wants_usage:
            yield event({**self._chunk("chat.completion.chunk", []), "usage": run.usage.usage})
        yield DONE

    def _chunk(self, kind: str, choices: list[ChatChoice]) -> ChatCompletion:
        return {
            "id": self._run.request_id,
            "object": kind,
            "created": self._created,
            "model": self._run.service.model,
            "choices": choices,
            "usage": None,
        }

    def _first_chunk(self) -> ChatCompletion:
        """Returns the chunk with the role of each message."""
        choices: list[ChatChoice] = [
            {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            for index in range(self._run.params.n)
        ]
        chunk = self._chunk("chat.completion.chunk", choices)
        if self._body.wants_continuous_usage:
            chunk["usage"] = self._run.usage.usage
        self._add_prompt(chunk)
        return chunk

    def _add_prompt(self, answer: ChatCompletion) -> None:
        output = self._run.prompt_output
        if output is not None and self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or [])
        if output is not None and self._body.return_token_ids:
            answer["prompt_token_ids"] = output.prompt_token_ids

    def _delta_chunk(self, update: list[ChoiceUpdate]) -> ChatCompletion | None:
        """Returns the chunk with what is new; None if there is nothing to tell."""
        choices = [choice for each in update if (choice := self._delta_choice(each)) is not None]
        if not choices and not self._body.wants_continuous_usage:
            return None
        chunk = self._chunk("chat.completion.chunk", choices)
        if self._body.wants_continuous_usage:
            chunk["usage"] = self._run.usage.usage
        return chunk

    def _choice(self, update: ChoiceUpdate) -> ChatChoice:
        parsed = ParsedMessage()
        parsed.add(update.deltas)
        message: MessagePart = {
            "role": "assistant",
            "content": parsed.content or (None if parsed.tool_calls or parsed.reasoning else ""),
            "reasoning": parsed.reasoning or None,
            "reasoning_content": parsed.reasoning or None,
        }
        if parsed.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in parsed.tool_calls
            ]
        choice = self._common(update)
        choice["message"] = message
        return choice

    def _delta_choice(self, update: ChoiceUpdate) -> ChatChoice | None:
        """Returns what is new in a message; None if that is only text that its parser holds back."""
        choice = self._common(update)
        choice["delta"] = _delta(update.deltas)
        is_new = choice["delta"] or choice["finish_reason"] or choice["logprobs"] or self._body.return_token_ids
        return choice if is_new else None

    def _common(self, update: ChoiceUpdate) -> ChatChoice:
        """Returns the fields that a message and what is new in one share."""
        completion, body = update.completion, self._body
        rows, as_ids = completion.logprobs, bool(body.return_tokens_as_token_ids)
        choice: ChatChoice = {
            "index": update.index,
            "logprobs": chat_logprobs(rows, body.top_logprobs or 0, as_ids) if rows else None,
            "finish_reason": update.finish_reason,
        }
        if update.finish_reason is not None:
            choice["stop_reason"] = completion.stop_reason
        if body.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice


def _delta(deltas: list[Delta]) -> MessagePart:
    """Returns what is new in a message."""
    content = "".join(each.content for each in deltas)
    reasoning = "".join(each.reasoning for each in deltas)
    part: MessagePart = {}
    if content:
        part["content"] = content
    if reasoning:
        part["reasoning"] = part["reasoning_content"] = reasoning
    calls: dict[int, ToolCallPart] = {}  # by index: one entry a call
    for each in deltas:
        if each.tool_call is not None:
            _add_call(calls, each.tool_call)
    if calls:
        part["tool_calls"] = list(calls.values())
    return part


def _add_call(calls: dict[int, ToolCallPart], delta: ToolCallDelta) -> None:
    call = calls.setdefault(delta.index, {"index": delta.index, "function": {"arguments": ""}})
    if delta.id is not None and delta.name is not None:
        call["id"], call["type"], call["function"]["name"] = delta.id, "function", delta.name
    call["function"]["arguments"] += delta.arguments
