"""POST /v1/responses: the part of OpenAI's Responses API that stores nothing."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.server.chat import ChatRun, chat_request
from nanovllm.server.errors import fields_named
from nanovllm.server.exchange import exchange_of
from nanovllm.server.logprobs import chat_logprobs
from nanovllm.server.protocol.errors import RESPONSES
from nanovllm.server.protocol.responses import ResponsesRequest
from nanovllm.server.protocol.responses_input import chat_body
from nanovllm.server.protocol.responses_output import Event, ResponseEvents
from nanovllm.server.responses import json_answer, named_event, stream_answer
from nanovllm.server.service import service_of

router = APIRouter(responses=RESPONSES)

PATH = "/v1/responses"


@router.post(PATH)
async def create_response(request: Request, body: ResponsesRequest) -> Response:
    """Generates what follows the input: reasoning, a message, calls of functions."""
    service = service_of(request)
    service.report_ignored(body.unknown_fields)
    schema = "text.format.schema" if body.text is not None else "tools"
    names = {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs", "structured_outputs.json": schema}
    with fields_named(names):
        run = await ChatRun.start(service, exchange_of(request), chat_request(chat_body(body)), "resp", PATH)
        response = ResponseEvents(run.request_id, service.model, time.time(), body)
        events = _events(run, response)
        if not body.stream:
            return await json_answer(request, _complete(events))
        return await stream_answer(
            request, _encoded(events), lambda error: b"".join(map(named_event, response.fail(error)))
        )


async def _events(run: ChatRun, response: ResponseEvents) -> AsyncGenerator[Event, None]:
    has_begun = False
    async with aclosing(run.updates()) as updates:
        async for (update,) in updates:
            if not has_begun:
                has_begun = True
                for event in response.start():
                    yield event
            completion = update.completion
            logprobs = chat_logprobs(completion.logprobs or [], run.body.top_logprobs or 0, False)["content"]
            for event in response.add(update.deltas, len(completion.token_ids), logprobs):
                yield event
            if update.finish_reason == "abort":
                raise run.service.aborted()
            if update.finish_reason is not None:
                for event in response.finish(completion, run.usage.usage):
                    yield event


async def _encoded(events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            yield named_event(event)


async def _complete(events: AsyncGenerator[Event, None]) -> Any:
    async with aclosing(events):
        return [event async for event in events][-1]["response"]
