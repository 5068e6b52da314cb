"""Every exception that nanovllm raises on purpose.

    NanoVLLMError
    ├── InvalidArgumentError (also ValueError)   a field's value is not allowed
    │   └── RequestTooLargeError                 a request that could never run on this engine
    ├── UnknownArgumentError (also TypeError)    no such argument; names the nearest one
    ├── ModelLoadError                           a checkpoint that is missing, incomplete or not supported
    ├── OutOfMemoryError                         the device cannot hold what was asked for
    ├── BackendUnavailableError                  an attention backend that cannot run here
    ├── InvalidStateError (also RuntimeError)    a call that does not fit what came before it
    ├── StepFailedError                          a step raised: its requests are aborted, the engine goes on
    ├── ChannelError                             a message between processes that could not be handed over
    ├── WorkerError                              a rank's process died, raised, or did not start
    └── EngineDeadError                          the engine met an error that it cannot run on from

A message says which field, its value, what is allowed and what to do about it.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Iterable
from typing import Any, TypeVar

__all__ = [
    "BackendUnavailableError",
    "ChannelError",
    "EngineDeadError",
    "InvalidArgumentError",
    "InvalidStateError",
    "ModelLoadError",
    "NanoVLLMError",
    "OutOfMemoryError",
    "RequestTooLargeError",
    "StepFailedError",
    "UnknownArgumentError",
    "WorkerError",
    "checks_argument_names",
]

T = TypeVar("T")


class NanoVLLMError(Exception):
    """Root of the tree: `except NanoVLLMError` catches everything that nanovllm raises on purpose."""


class InvalidArgumentError(NanoVLLMError, ValueError):
    """A field holds a value that is not allowed.

    The message is built from the parts, so that each error has all of them: `field`, `value`,
    `allowed` (a phrase such as "an integer ≥ 1") and, where there is one, `hint`: what to do.
    """

    def __init__(self, field: str, value: object, allowed: str, hint: str = "") -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        self.hint = hint
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        message = f"{field}={shown} is not allowed: it must be {allowed}."
        super().__init__(f"{message} {hint}" if hint else message)

    def __reduce__(self) -> tuple[type[InvalidArgumentError], tuple[str, object, str, str]]:
        return type(self), (self.field, self.value, self.allowed, self.hint)


class RequestTooLargeError(InvalidArgumentError):
    """A request that could never run here, however long it waited: refused before it is queued."""


class UnknownArgumentError(NanoVLLMError, TypeError):
    """An argument that does not exist. Names the closest known one, for a typo should not cost a search."""

    def __init__(self, callee: str, name: str, known: Iterable[str]) -> None:
        nearest = difflib.get_close_matches(name, list(known), n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        super().__init__(f"{callee} has no argument {name!r}.{hint}")


class ModelLoadError(NanoVLLMError):
    """A checkpoint that is missing, incomplete, has left-over weights, or is of no supported architecture."""


class OutOfMemoryError(NanoVLLMError):
    """The device cannot hold what was asked for; the message has the numbers and the setting to change."""


class BackendUnavailableError(NanoVLLMError):
    """An attention backend was asked for by name and cannot run here; the message says why."""


class InvalidStateError(NanoVLLMError, RuntimeError):
    """A call that does not fit what came before it, such as a stop without a start."""


class StepFailedError(NanoVLLMError):
    """A step raised, and aborted what was running; the engine goes on. What it raised is the `__cause__`."""


class ChannelError(NanoVLLMError):
    """A message between two processes was not read in time, or what was read is not one."""


class WorkerError(NanoVLLMError):
    """The process of rank `rank` died, raised, or did not start in time; `traceback` is its own text, if it had one."""

    def __init__(self, rank: int, problem: str, traceback: str = "") -> None:
        self.rank = rank
        self.problem = problem
        self.traceback = traceback
        super().__init__(f"Rank {rank} {problem}" + (f"\n\nOn rank {rank}:\n{traceback}" if traceback else ""))

    def __reduce__(self) -> tuple[type[WorkerError], tuple[int, str, str]]:
        return type(self), (self.rank, self.problem, self.traceback)


class EngineDeadError(NanoVLLMError):
    """A step failed on the device. What was running is aborted; the first error is the `__cause__`."""


def checks_argument_names(cls: type[T]) -> type[T]:
    """Class decorator: an unknown keyword raises UnknownArgumentError with the nearest known name."""
    original: Any = cls.__init__
    known = list(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def checked(self: T, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                raise UnknownArgumentError(cls.__name__, name, known)
        original(self, *args, **kwargs)

    setattr(cls, "__init__", checked)  # noqa: B010 - an assignment would need the class's own signature
    return cls
