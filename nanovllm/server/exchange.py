"""Exchange: one HTTP request and what is known about its answer, for the access log and the request limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from starlette.requests import Request
from starlette.types import Scope, Send

SCOPE_KEY = "nanovllm.exchange"  # of the ASGI scope


@dataclass
class Exchange:
    """One request. Endpoints fill in what they know; the access log shows it when the answer has ended.

    number: unique in this process. client_request_id: the client's X-Request-Id. request_id: the id in the answer and
    of the engine's request, which endpoints that generate set with `name`. send_body: sends a part of the answer's body
    past the layers of the framework, which look at its head alone.
    """

    number: str
    send_body: Send
    client_request_id: str | None = None
    request_id: str | None = None
    status: int | None = None  # None: the answer has not started
    num_prompt_tokens: int | None = None
    num_output_tokens: int = 0
    num_admitted: int = 0  # completions that count against the limit of the queue
    engine_ids: list[str] = field(default_factory=list)  # of the engine's requests that answer it

    def name(self, prefix: str) -> str:
        """Returns the request's id, such as `chatcmpl-…` for the prefix `chatcmpl`, and keeps it."""
        self.request_id = f"{prefix}-{self.number}"
        return self.request_id


def endpoint_path(scope: Scope) -> str:
    """Returns the path of a request without that of `--root-path`, which ASGI puts before it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def exchange_of(request: Request) -> Exchange:
    """Returns the exchange that the middleware has begun."""
    return cast(Exchange, request.scope[SCOPE_KEY])
