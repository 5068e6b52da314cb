"""make_app: the ASGI application with all endpoints."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Lifespan

from nanovllm import __version__
from nanovllm.errors import NanoVLLMError
from nanovllm.server import (
    chat_completions,
    chat_page,
    completions,
    dev,
    messages,
    models,
    responses_api,
    status,
    tokenize,
)
from nanovllm.server.errors import ApiError, as_api_error
from nanovllm.server.exchange import endpoint_path
from nanovllm.server.middleware import ID_HEADERS, RequestMiddleware
from nanovllm.server.protocol.anthropic_output import anthropic_error
from nanovllm.server.responses import JsonResponse
from nanovllm.server.service import Service

_NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False}  # spans are those of the engine's requests


def make_app(service: Service, lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """Returns the application that answers with `service`. lifespan: for servers that run one."""
    app = FastAPI(
        title="nanovllm",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        telemetry=_NO_TELEMETRY,
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # the middleware takes a slash at the end away
    app.state.service = service
    for module in (completions, chat_completions, messages, responses_api, models, tokenize, status, chat_page):
        app.include_router(module.router)
    if service.settings.dev:
        app.include_router(dev.router)
    for kind in (HTTPException, RequestValidationError, NanoVLLMError):
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(RequestMiddleware, service=service, body_of=error_body)
    if service.settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors_origin,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=ID_HEADERS,
        )
    return app


def error_body(error: ApiError, path: str) -> Any:
    """Returns the body of an error, in the form of the API that the path belongs to."""
    return anthropic_error(error) if path.startswith(messages.PATH) else error.body()


async def _answer_error(request: Request, caught: Exception) -> Response:
    error = as_api_error(caught)
    return JsonResponse(error_body(error, endpoint_path(request.scope)), error.status, error.headers)
