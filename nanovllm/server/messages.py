"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.server.chat import ChatRun, chat_request, render
from nanovllm.server.errors import ApiError, fields_named
from nanovllm.server.exchange import exchange_of
from nanovllm.server.protocol.anthropic import CountTokensRequest, MessagesRequest
from nanovllm.server.protocol.anthropic_input import chat_body
from nanovllm.server.protocol.anthropic_output import Event, MessageEvents, anthropic_error, message_of
from nanovllm.server.responses import JsonResponse, json_answer, named_event, stream_answer
from nanovllm.server.service import service_of
from nanovllm.server.tokenize import encode

router = APIRouter()

PATH = "/v1/messages"


@router.post(PATH)
async def create_message(request: Request, body: MessagesRequest) -> Response:
    """Generates the next message of a conversation, in Anthropic's form."""
    service = service_of(request)
    service.report_ignored(body.unknown_fields)
    schema = "output_config.format.schema" if body.output_config is not None else "tools"
    with fields_named({"stop": "stop_sequences", "structured_outputs.json": schema}):
        run = await ChatRun.start(service, exchange_of(request), chat_request(chat_body(body)), "msg", PATH)
        if body.stream:
            return await stream_answer(request, _encoded(_events(run)), _error_event)
        return await json_answer(request, _complete(_events(run)))


@router.post(f"{PATH}/count_tokens")
async def count_tokens(request: Request, body: CountTokensRequest) -> Response:
    """Answers the number of tokens of the prompt that a request to /v1/messages would have."""
    service = service_of(request)
    service.check_model(body.model)
    service.report_ignored(body.unknown_fields)
    prompt = await render(service, chat_request(chat_body(body)))
    return JsonResponse({"input_tokens": len(await service.in_thread(encode, service.tokenizer, prompt, False))})


async def _events(run: ChatRun) -> AsyncGenerator[Event, None]:
    message = MessageEvents(run.request_id, run.service.model)
    has_begun = False
    async with aclosing(run.updates()) as updates:
        async for (update,) in updates:
            if not has_begun:
                has_begun = True
                for event in message.start(run.usage.num_prompt_tokens, run.usage.num_cached_tokens):
                    yield event
            for event in message.add(update.deltas):
                yield event
            if update.finish_reason == "abort":
                raise run.service.aborted()
            if update.finish_reason is not None:
                for event in message.finish(update.completion, run.usage.num_output_tokens):
                    yield event


async def _encoded(events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            yield named_event(event)


async def _complete(events: AsyncGenerator[Event, None]) -> dict[str, Any]:
    async with aclosing(events):
        return message_of([event async for event in events])


def _error_event(error: ApiError) -> bytes:
    return named_event(anthropic_error(error))
