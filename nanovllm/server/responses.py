"""Answers: JSON, and streams of server-sent events that end when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from nanovllm.server.errors import ApiError, as_api_error
from nanovllm.server.exchange import Exchange, exchange_of

T = TypeVar("T")

_OPTIONS = orjson.OPT_NON_STR_KEYS
DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client has closed the connection before the answer was complete."""


class JsonResponse(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content, option=_OPTIONS)


def event(data: Any) -> bytes:
    """Returns a server-sent event in OpenAI's form."""
    return b"data: " + orjson.dumps(data, option=_OPTIONS) + b"\n\n"


class TextEvents:
    """Makes events that differ in the text of one field. Encodes the rest once for each index.

    field: its name, which no other field of the events has.
    """

    def __init__(self, field: str) -> None:
        self._key = f'"{field}":'.encode()  # does not occur in texts, whose quotes are escaped
        self._around: dict[int, tuple[bytes, bytes]] = {}  # what is before and after the text, by index

    def event(self, index: int, text: str, make: Callable[[], Any]) -> bytes:
        """Returns the event of an index with this text. make: returns its data; called for the first one."""
        encoded = orjson.dumps(text)
        if index in self._around:
            before, after = self._around[index]
            return before + encoded + after
        data = event(make())
        before, after = data.split(self._key + encoded)
        self._around[index] = before + self._key, after
        return data


def named_event(data: Mapping[str, Any]) -> bytes:
    """Returns a server-sent event that is named after its `type`, as in Anthropic's API and OpenAI's Responses API."""
    return f"event: {data['type']}\n".encode() + event(data)


def error_event(error: ApiError) -> bytes:
    """Returns the event that ends a stream which failed."""
    return event(error.body())


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Returns what `work` returns. Cancels it and raises ClientGoneError when the client leaves."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnection(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def json_answer(request: Request, work: Coroutine[Any, Any, Any]) -> Response:
    """Returns a JSON answer with what `work` returns. Cancels `work` when the client leaves."""
    return JsonResponse(await unless_disconnected(request.receive, work))


async def stream_answer(
    request: Request,
    events: AsyncGenerator[bytes, None],
    describe_error: Callable[[ApiError], bytes] = error_event,
) -> Response:
    """Returns a stream of server-sent events. Closes `events` when the client leaves.

    The answer begins with the first event, so an error before it is an ordinary answer with its status. A later one is
    an event, made by `describe_error`, which ends the stream.
    """
    try:
        first = await unless_disconnected(request.receive, anext(events))
    except BaseException:
        await events.aclose()
        raise
    return _EventStream(exchange_of(request), first, events, describe_error)


class _EventStream(Response):
    def __init__(
        self,
        exchange: Exchange,
        first: bytes,
        events: AsyncGenerator[bytes, None],
        describe_error: Callable[[ApiError], bytes],
    ) -> None:
        self._exchange, self._first, self._events, self._describe_error = exchange, first, events, describe_error
        self.status_code, self.background = 200, None
        # X-Accel-Buffering: nginx passes each event on at once.
        self.init_headers({"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_disconnected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            send = self._exchange.send_body
            await send(_part(self._first))
            try:
                async for data in self._events:
                    # Waits while the client reads slowly. The engine merges what it does not fetch in that time.
                    await send(_part(data))
            except Exception as error:
                await send(_part(self._describe_error(as_api_error(error))))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _part(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}
