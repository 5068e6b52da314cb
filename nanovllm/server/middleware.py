"""RequestMiddleware: what every HTTP request goes through before an endpoint sees it, and after.

It gives the request an id, checks the API key and the size of the body, continues the client's trace, answers errors in
the form of the API, and writes the access log.
"""

from __future__ import annotations

import hashlib
import hmac
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.logs import events
from nanovllm.server.errors import ApiError, as_api_error
from nanovllm.server.exchange import SCOPE_KEY, Exchange, endpoint_path
from nanovllm.server.responses import ClientGoneError, JsonResponse
from nanovllm.server.service import Service
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

_OPEN = ("/", "/health", "/ping")  # without a key
_UNLOGGED = ("/health", "/ping", "/metrics", "/events")
ID_HEADERS = ("X-Request-Id", "Request-Id")  # of the answer; the second one is Anthropic's
_CLIENT_GONE = 499  # nginx's status of an answer that nobody waits for
_MAX_ID = 128
_MAX_PATH = 200  # characters in the log


class RequestMiddleware:
    """An ASGI middleware around all endpoints. body_of: makes the body of an error at a path."""

    def __init__(self, app: ASGIApp, service: Service, body_of: Callable[[ApiError, str], Any]) -> None:
        self._app, self._service, self._body_of = app, service, body_of
        self._keys = [_digest(key) for key in service.settings.api_key]
        self._max_body = service.settings.max_body * 10**6

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, path = time.monotonic(), endpoint_path(scope)
        if len(path) > 1 and path.endswith("/"):
            path = path.rstrip("/")
            scope["path"] = scope["path"].rstrip("/")
        exchange = scope[SCOPE_KEY] = Exchange(uuid.uuid4().hex, send)
        is_counted = path not in _UNLOGGED
        self._service.counts.add(requests=is_counted)
        try:
            await self._answer(scope, receive, send, exchange)
        finally:
            self._service.release(exchange)  # first: a server without load has room
            self._service.counts.add(requests=-is_counted)
            if is_counted:
                _log(scope, exchange, time.monotonic() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        headers = Headers(scope=scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                name = exchange.client_request_id or exchange.request_id or exchange.number
                answer_headers = MutableHeaders(scope=message)
                for header in ID_HEADERS:
                    answer_headers[header] = name
            await send(message)

        try:
            exchange.client_request_id = _client_request_id(headers)
            self._check_key(endpoint_path(scope), headers)
            with _client_trace(headers):
                await self._app(scope, self._limited(headers, receive), send_with_id)
        except ClientGoneError:
            exchange.status = _CLIENT_GONE
        except Exception as caught:
            error = as_api_error(caught)
            if exchange.status is not None:  # the answer has begun: it can only be cut off
                raise
            await self._error_answer(error, endpoint_path(scope))(scope, receive, send_with_id)

    def _error_answer(self, error: ApiError, path: str) -> JsonResponse:
        return JsonResponse(self._body_of(error, path), error.status, error.headers)

    def _check_key(self, path: str, headers: Headers) -> None:
        """Raises ApiError without a right key. The time that it takes does not tell how much of a key is right."""
        if not self._keys or path in _OPEN:
            return
        scheme, _, key = headers.get("Authorization", "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else headers.get("X-Api-Key", ""))
        if not any(hmac.compare_digest(given, each) for each in self._keys):
            headers_of_answer = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, "The API key is missing or wrong.", code="invalid_api_key", headers=headers_of_answer)

    def _limited(self, headers: Headers, receive: Receive) -> Receive:
        """Returns `receive`, which raises ApiError for a body that is too large."""
        error = ApiError(413, f"The body is larger than {self._max_body} bytes.", code="body_too_large")
        declared = headers.get("Content-Length", "")
        if declared.isdecimal() and int(declared) > self._max_body:
            raise error
        size = 0

        async def receive_limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body:
                raise error
            return message

        return receive_limited


def _digest(key: str) -> bytes:
    """Returns a hash of the key: all have the same length, which comparing then does not tell."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _client_request_id(headers: Headers) -> str | None:
    """Returns the client's id of the request. Raises ApiError for one that is no name."""
    name = headers.get("X-Request-Id")
    if name is None:
        return None
    if not (0 < len(name) <= _MAX_ID and name.isascii() and name.isprintable()):
        raise ApiError(400, f"X-Request-Id must have 1 to {_MAX_ID} printable ASCII characters.", param="X-Request-Id")
    return name


@contextmanager
def _client_trace(headers: Headers) -> Iterator[None]:
    """Makes the client's span, if it sends one, the parent of the request's span."""
    carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
    if "traceparent" not in carrier:
        yield
        return
    try:
        from opentelemetry import context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError:
        yield
        return
    token = context.attach(TraceContextTextMapPropagator().extract(carrier))
    try:
        yield
    finally:
        context.detach(token)


def _log(scope: Scope, exchange: Exchange, seconds: float) -> None:
    events.http_request.log(
        logger,
        method=scope["method"][:16],
        path=endpoint_path(scope)[:_MAX_PATH],
        status=_CLIENT_GONE if exchange.status is None else exchange.status,
        duration_s=round(seconds, 6),
        request_id=exchange.request_id,
        client_request_id=exchange.client_request_id,
        num_prompt_tokens=exchange.num_prompt_tokens,
        num_output_tokens=exchange.num_output_tokens,
    )
