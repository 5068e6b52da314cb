"""The answer to a request that failed, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from typing_extensions import TypedDict


class ErrorDetails(TypedDict):
    """What is wrong. param: the field that it is about. code: a name for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    error: ErrorDetails


_MEANINGS = {
    400: "A field is not allowed",
    401: "The API key is missing or wrong",
    404: "There is no such model",
    413: "The body is too large",
    422: "Never sent: 400 stands for it",
    429: "The queue is full",
    500: "The engine failed or has ended",
    503: "The engine is starting, or the server is shutting down",
}
# For the OpenAPI document.
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": meaning} for status, meaning in _MEANINGS.items()
}
