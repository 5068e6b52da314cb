"""ApiError: an answer with an error status, in the form of the OpenAI API; and which error becomes which answer.

Answers say which field is wrong and what is allowed. They never quote a text of the request, a path of the machine or a
Python traceback.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from traceback import format_exception
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from nanovllm.errors import (
    EngineDeadError,
    InvalidArgumentError,
    InvalidLogitsError,
    NanoVLLMError,
    ReplicaLostError,
    RequestTooLargeError,
    UnknownArgumentError,
)
from nanovllm.logs import events
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 499: "server_error"}
_MESSAGES = {
    404: "There is no such endpoint. The paths of the OpenAI API begin with /v1, and /openapi.json lists all.",
}
# Of fields that have values of several types: pydantic names only some of them.
_UNIONS = {
    "content": "a text or a list of parts, such as {'type': 'text', 'text': '…'}",
    "prompt": "a text, a list of token ids, or a list of several texts or lists of token ids",
    "stop": "a text or a list of texts",
    "tool_choice": "'none', 'auto', 'required' or {'type': 'function', 'function': {'name': '…'}}",
}
_MEMBERS = {"str", "int", "bool", "float"}  # of unions, in the place of a problem
_MAX_FIELD = 200  # characters of a field's name, which may come from the request


class ApiError(HTTPException):
    """An error that a client gets. param: the field that it is about. code: a name for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.status, self.code = status, code
        self.message, self.param = _encodable(message), None if param is None else _encodable(param)

    @property
    def type(self) -> str:
        """OpenAI's name of the kind of error."""
        return "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """Returns the answer's body in OpenAI's form."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def _encodable(text: str) -> str:
    """Returns the text without halves of surrogate pairs, which a chat template or a name may bring."""
    return text.encode("utf-8", "replace").decode()


def invalid(param: str, message: str) -> ApiError:
    """Returns the error of a request whose field `param` is not allowed."""
    return ApiError(400, message, param=param)


@contextmanager
def fields_named(names: Mapping[str, str]) -> Iterator[None]:
    """Gives errors of the block the name of a field that the client has used, where `names` has it."""
    try:
        yield
    except InvalidArgumentError as error:
        if error.field not in names:
            raise
        raise type(error)(names[error.field], error.value, error.allowed, error.hint) from None


def as_api_error(error: Exception) -> ApiError:
    """Returns the answer to an error of any kind."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):  # of the framework
        message = _MESSAGES.get(error.status_code, str(error.detail))
        if error.status_code == 400:  # its cause is what reading the body raised
            message = _unreadable(error.__cause__)
        elif error.status_code == 405:
            message = f"This endpoint takes {(error.headers or {}).get('Allow', 'other methods')} alone."
        return ApiError(error.status_code, message, headers=error.headers)
    if isinstance(error, RequestValidationError):
        return _of_validation(error.errors())
    if isinstance(error, ValidationError):  # a request that was turned into another one
        return _of_validation([{**each, "loc": ("body", *each["loc"])} for each in error.errors()])
    if isinstance(error, InvalidArgumentError):
        return _of_argument(error)
    if isinstance(error, EngineDeadError):
        return ApiError(500, "The engine has ended.", code="engine_dead")
    if isinstance(error, ReplicaLostError):
        return ApiError(500, "The replica that ran this request has ended. Send it again.", code="replica_lost")
    if isinstance(error, InvalidLogitsError):
        return ApiError(500, "The model computed NaN or infinity for this request.", code="invalid_logits")
    if isinstance(error, UnknownArgumentError):
        return ApiError(400, str(error))
    if not isinstance(error, NanoVLLMError):  # the engine has logged its own
        events.server_error.log(logger, error=type(error).__name__, traceback="".join(format_exception(error)))
    return ApiError(500, "The server failed to answer this request. Its log says why.", code="internal_error")


def _unreadable(cause: BaseException | None) -> str:
    """Returns what is wrong with a body that cannot be read."""
    if isinstance(cause, RecursionError):
        return "The body is nested too deeply."
    if isinstance(cause, ValueError) and not isinstance(cause, UnicodeError):
        return "The body has a number with too many digits."
    return "The body is not JSON in UTF-8. It must not be compressed."


def _of_argument(error: InvalidArgumentError) -> ApiError:
    """Returns the answer to a value that is not allowed. Only numbers and sizes are quoted."""
    if error.field == "tokenizer":
        return invalid("messages", "The model has no chat template: use /v1/completions.")
    is_too_large = isinstance(error, RequestTooLargeError)
    quotable = is_too_large or error.value is None or isinstance(error.value, (bool, int, float))
    message = str(error) if quotable else f"{error.field} must be {error.allowed}. {error.hint}".rstrip()
    return ApiError(400, message, param=error.field, code="context_length_exceeded" if is_too_large else None)


def _of_validation(problems: Sequence[Any]) -> ApiError:
    """Returns the answer to a body that is not JSON, or not of the declared form."""
    first = problems[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "The body is not valid JSON.", code="invalid_json")
    if first["loc"] == ("body",):
        return ApiError(400, "The body must be a JSON object, sent with 'Content-Type: application/json'.")
    param = _field(first["loc"])
    if (name := param.rpartition(".")[2]) in _UNIONS and first["loc"][-1] != name:  # it ends with a member's type
        return ApiError(400, f"{param} must be {_UNIONS[name]}.", param=param)
    # A union has a problem for each of its members.
    wrong = dict.fromkeys(each["msg"] for each in problems if _field(each["loc"]) == param)
    return ApiError(400, f"{param}: {', or '.join(wrong)}.", param=param)


def _field(place: Sequence[str | int]) -> str:
    """Returns the name of a field, such as `messages.0.content`, from its place in pydantic's form."""
    names = [str(part) for part in place if part not in _MEMBERS]
    return ".".join(name for name in names[1:] if name.replace("_", "").isalnum())[:_MAX_FIELD]
