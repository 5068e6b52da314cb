"""answer_lines: answers requests in lines of JSON with the endpoints of the server, without HTTP.

A line is the body of a request, {"prompt": …} or {"messages": …}, or a line of OpenAI's batch files:
{"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {…}}. The answer to the first is the body that
the server would send, the answer to the second a line of OpenAI's output files.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import orjson
from starlette.types import ASGIApp, Message

from nanovllm.server.errors import ApiError, invalid

_URLS = ("/v1/completions", "/v1/chat/completions")


async def answer_lines(
    app: ASGIApp, lines: Iterable[str | bytes], write: Callable[[bytes], object], max_running: int
) -> int:
    """Writes the answer to each line, in order, and returns how many requests failed.

    write: gets a line with its end. max_running: lines that are read ahead of the first unanswered one.
    """
    running: deque[asyncio.Task[tuple[bool, Any]]] = deque()
    num_failed = 0

    async def write_next() -> int:
        is_ok, answer = await running.popleft()
        write(orjson.dumps(answer) + b"\n")
        return not is_ok

    try:
        iterator = iter(lines)
        while (line := await asyncio.to_thread(next, iterator, None)) is not None:
            if line.strip():
                running.append(asyncio.ensure_future(_answer(app, line)))
            if len(running) >= max_running:
                num_failed += await write_next()
        while running:
            num_failed += await write_next()
    finally:
        for task in running:
            task.cancel()
    return num_failed


async def _answer(app: ASGIApp, line: str | bytes) -> tuple[bool, Any]:
    """Returns whether a line's request succeeded, and its answer."""
    request: dict[str, Any] = {}
    is_batch = False
    try:
        request = _read(line)
        is_batch = "custom_id" in request or "url" in request
        path, body = (_url_of(request), request.get("body")) if is_batch else (_path_of(request), request)
        status, name, answer = await _call(app, path, _without_stream(body))
    except ApiError as error:
        status, name, answer = error.status, None, error.body()
    if not is_batch:
        return status == 200, answer
    response = {"status_code": status, "request_id": name, "body": answer}
    return status == 200, {"id": name, "custom_id": request.get("custom_id"), "response": response, "error": None}


def _read(line: str | bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise ApiError(400, "The line is not valid JSON.", code="invalid_json") from None
    if not isinstance(request, dict):
        raise ApiError(400, "The line must be a JSON object.")
    return request


def _url_of(request: dict[str, Any]) -> str:
    url: str | None = request.get("url")
    if url not in _URLS:
        raise invalid("url", f"url must be one of {', '.join(_URLS)}.")
    return url


def _path_of(body: dict[str, Any]) -> str:
    return _URLS[1] if "messages" in body else _URLS[0]


def _without_stream(body: Any) -> Any:
    if isinstance(body, dict) and body.get("stream"):
        raise invalid("stream", "stream must be false: a line has one answer.")
    return body


async def _call(app: ASGIApp, path: str, body: Any) -> tuple[int, str, Any]:
    """Returns the status, the request id and the body of an endpoint's answer."""
    request: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode()}]
    sent: list[Message] = []

    async def receive() -> Message:
        if request:
            return request.pop()
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]  # nobody leaves

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers, "root_path": ""}
    await app(scope, receive, send)
    start, *parts = sent
    name = dict(start["headers"])[b"x-request-id"].decode()
    return start["status"], name, orjson.loads(b"".join(part["body"] for part in parts))
