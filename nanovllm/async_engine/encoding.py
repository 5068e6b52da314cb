"""The messages between an engine's process and its consumers, as bytes: typed, versioned, and without pickle.

    version, length of the header (uint32 each) · the header, as JSON · the arrays, one after another

In the header an object is {"is": name of its type, …}, and an array its type and its length. JSON carries everything
that a request can hold, such as texts with halves of surrogate pairs, which UTF-8 and msgpack do not.
"""

from __future__ import annotations

import builtins
import contextvars
import json
import os
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, TypeVar

import numpy as np

from nanovllm import errors
from nanovllm.async_engine import messages
from nanovllm.async_engine.messages import Command, Event
from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.batch import LogitEdits
from nanovllm.errors import ChannelError, shown
from nanovllm.requests.preparation import PreparedRequest
from nanovllm.requests.stop_search import StopSearch
from nanovllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

T = TypeVar("T")

VERSION = 1
_PREFIX = struct.Struct("=II")


@dataclass(frozen=True)
class StartEngine:
    """The first message to the process. levels: of the package's loggers, by name."""

    config: EngineConfig
    levels: dict[str, int]


@dataclass(frozen=True)
class StopEngine:
    """End the engine and the process."""


@dataclass(frozen=True)
class AskMetrics:
    """Answer with the engine's metrics of this moment."""


@dataclass(frozen=True)
class AddClient:
    """Serve another process, too. Its connection follows."""

    pid: int


@dataclass(frozen=True)
class EngineResolved:
    """The model is loaded."""

    resolved: ResolvedConfig


@dataclass(frozen=True)
class EngineReady:
    """The engine takes requests. default_params: of requests without any. first_number: of this client's requests."""

    default_params: SamplingParams
    first_number: int


@dataclass(frozen=True)
class EngineMetrics:
    """The engine's metrics, as `MetricsSnapshot.to_numbers` returns them."""

    numbers: dict[str, Any]


@dataclass(frozen=True)
class ClientDropped:
    """The engine has ended the connection, because the client did not read what it was sent."""


@dataclass(frozen=True)
class LogRecord:
    """A record of the process's log, as the attributes of a `logging.LogRecord`."""

    attributes: dict[str, Any]


ToProcess: TypeAlias = "Command | StartEngine | StopEngine | AskMetrics | AddClient"
FromProcess: TypeAlias = "Event | EngineResolved | EngineReady | EngineMetrics | ClientDropped | LogRecord"

_TYPES: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (
        *(value for value in vars(messages).values() if getattr(value, "__module__", "") == messages.__name__),
        StartEngine,
        StopEngine,
        AskMetrics,
        AddClient,
        EngineResolved,
        EngineReady,
        EngineMetrics,
        ClientDropped,
        LogRecord,
        EngineConfig,
        ResolvedConfig,
        LogitEdits,
        SamplingParams,
        StructuredOutputsParams,
        PreparedRequest,
    )
    if isinstance(each, type)
}
_DERIVED = "stop_search"  # a field of PreparedRequest, made again from its parameters


def crosses(kind: type[T]) -> type[T]:
    """Lets messages of another type, a dataclass, be encoded too."""
    _TYPES[kind.__name__] = kind
    return kind


def encode(message: object) -> bytes:
    """Returns a message as bytes. Raises TypeError for an object of another type in it."""
    arrays: list[np.ndarray[Any, Any]] = []
    header = json.dumps(_plain(message, arrays), separators=(",", ":")).encode()
    return b"".join([_PREFIX.pack(VERSION, len(header)), header, *(array.tobytes() for array in arrays)])


def decode(data: bytes) -> Any:
    """Returns the message in `data`. Raises ChannelError if another version has written it."""
    version, length = _PREFIX.unpack_from(data)
    if version != VERSION:
        raise ChannelError(f"The engine's process sends messages of version {version}, and this one reads {VERSION}.")
    start = _PREFIX.size + length
    return _Decoder(data, start).value(json.loads(data[_PREFIX.size : start]))


def _plain(value: Any, arrays: list[np.ndarray[Any, Any]]) -> Any:
    """Returns a value as JSON has it. Appends its arrays to `arrays`."""
    kind = type(value)
    if kind in _SIMPLE:
        return value
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {"is": "array", "dtype": value.dtype.str, "size": value.size}
    if isinstance(value, list):
        return [_plain(item, arrays) for item in value]
    if isinstance(value, tuple):
        return {"is": "tuple", "items": [_plain(item, arrays) for item in value]}
    if isinstance(value, Mapping):
        items = [[_plain(key, arrays), _plain(item, arrays)] for key, item in value.items()]
        return {"is": "dict", "items": items}
    if isinstance(value, bytes):
        return {"is": "bytes", "hex": value.hex()}
    if isinstance(value, RequestOutputKind):
        return {"is": "RequestOutputKind", "value": value.value}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, BaseException):
        return {"is": "error", **_plain_error(value)}
    if isinstance(value, contextvars.Context):
        return {"is": "context", "carrier": _carrier(value)}
    if kind.__name__ in _TYPES:
        names = [field.name for field in fields(value) if field.name != _DERIVED]
        return {"is": kind.__name__, "fields": [[name, _plain(getattr(value, name), arrays)] for name in names]}
    raise TypeError(f"{shown(value)} does not cross to the engine's process")


_SIMPLE = {type(None), bool, int, float, str}


class _Decoder:
    """Reads one message, whose arrays begin at `start`."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data, self._position = data, start

    def value(self, plain: Any) -> Any:
        """Returns the value that `_plain` wrote."""
        if isinstance(plain, list):
            return [self.value(item) for item in plain]
        if not isinstance(plain, dict):
            return plain
        name = plain["is"]
        if name == "array":
            array = np.frombuffer(self._data, plain["dtype"], plain["size"], self._position)
            self._position += array.nbytes
            return array
        if name == "tuple":
            return tuple(self.value(item) for item in plain["items"])
        if name == "dict":
            return {self.value(key): self.value(item) for key, item in plain["items"]}
        if name == "bytes":
            return bytes.fromhex(plain["hex"])
        if name == "RequestOutputKind":
            return RequestOutputKind(plain["value"])
        if name == "error":
            return _error(plain)
        if name == "context":
            return _context(plain["carrier"])
        named = {key: self.value(item) for key, item in plain["fields"]}
        if name == "PreparedRequest":
            stop = named["params"].stop
            named[_DERIVED] = StopSearch(tuple(stop)) if stop else None
        return _TYPES[name](**named)


# Errors


def _plain_error(error: BaseException) -> dict[str, Any]:
    arguments: tuple[object, ...] = error.__reduce__()[1]  # type: ignore[assignment]
    return {
        "type": type(error).__name__,
        "arguments": [_plain_argument(argument) for argument in arguments],
        "text": str(error),
        "cause": None if error.__cause__ is None else _plain_error(error.__cause__),
    }


def _plain_argument(argument: object) -> Any:
    try:
        return json.loads(json.dumps({"value": argument}))
    except Exception:  # an object of the caller's, a number with too many digits
        return {"shown": shown(argument)}


def _error(plain: dict[str, Any]) -> BaseException:
    """Returns an error of the same type, where the type is ours or Python's, else a RuntimeError with its text."""
    name = plain["type"]
    arguments = [errors._Shown(each["shown"]) if "shown" in each else each["value"] for each in plain["arguments"]]
    kind = getattr(errors, name, None) or getattr(builtins, name, None)
    error: BaseException
    if isinstance(kind, type) and issubclass(kind, BaseException):
        try:
            error = kind(*arguments)
        except Exception:  # a type that takes other arguments
            error = RuntimeError(f"{name}: {plain['text']}")
    else:
        error = RuntimeError(f"{name}: {plain['text']}")
    error.__cause__ = None if plain["cause"] is None else _error(plain["cause"])
    return error


# OpenTelemetry's context, as the headers traceparent and tracestate


def _carrier(context: contextvars.Context) -> dict[str, str]:
    if "opentelemetry.trace" not in sys.modules:  # then there is no span
        return {}
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    context.run(TraceContextTextMapPropagator().inject, carrier)
    return carrier


def _context(carrier: dict[str, str]) -> contextvars.Context:
    context = contextvars.copy_context()
    if carrier:
        from opentelemetry.context import attach
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context.run(lambda: attach(TraceContextTextMapPropagator().extract(carrier)))
    return context
