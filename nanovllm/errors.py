"""The exceptions that nanovllm raises on purpose.

    NanoVLLMError
    ├── InvalidArgumentError (also ValueError)   the value of a field is not allowed
    │   └── RequestTooLargeError                 a request can never run on this engine
    ├── UnknownArgumentError (also TypeError)    there is no such argument; the closest name is given
    ├── ModelLoadError                           a checkpoint is missing, incomplete or not supported
    ├── NotSupportedError (also AttributeError)  vLLM has this method, and nanovllm does not
    ├── OutOfMemoryError (also RuntimeError)     the device has too little memory
    ├── BackendUnavailableError                  an attention backend cannot run here
    ├── InvalidStateError (also RuntimeError)    a call is not possible in the current state
    ├── InvalidLogitsError                       the model computed NaN or infinity for a request
    ├── StepFailedError                          a step failed: its requests are aborted, the engine continues
    ├── ChannelError                             a message between processes was not delivered
    ├── WorkerError                              the process of a rank died, failed, or did not start
    ├── ReplicaLostError                         the replica that ran a request has ended; the others go on
    └── EngineDeadError                          the engine has ended, by an error or by exit()

A message names the field, its value, what is allowed, and what to do.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import pickle
from collections.abc import Iterable
from typing import Any, TypeVar

__all__ = [
    "BackendUnavailableError",
    "ChannelError",
    "EngineDeadError",
    "InvalidArgumentError",
    "InvalidLogitsError",
    "InvalidStateError",
    "ModelLoadError",
    "NanoVLLMError",
    "NotSupportedError",
    "OutOfMemoryError",
    "ReplicaLostError",
    "RequestTooLargeError",
    "StepFailedError",
    "UnknownArgumentError",
    "WorkerError",
    "checks_argument_names",
    "shown",
]

T = TypeVar("T")


class _Shown(str):
    """Text that stands for a value: its repr is the text."""

    def __repr__(self) -> str:
        return str(self)


def shown(value: object) -> str:
    """Returns the value as an error shows it, at most 80 characters. Never raises."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"<{type(value).__name__}, whose repr raises {type(error).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


class NanoVLLMError(Exception):
    """Base class of all exceptions that nanovllm raises on purpose."""


class InvalidArgumentError(NanoVLLMError, ValueError):
    """A field holds a value that is not allowed.

    The message is built from `field`, `value`, `allowed` (a phrase such as "an integer ≥ 1") and `hint` (what to do,
    may be empty).
    """

    def __init__(self, field: str, value: object, allowed: str, hint: str = "") -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        self.hint = hint
        message = f"{field}={shown(value)} is not allowed: it must be {allowed}."
        super().__init__(f"{message} {hint}" if hint else message)

    def __reduce__(self) -> tuple[type[InvalidArgumentError], tuple[str, object, str, str]]:
        value = self.value
        try:
            pickle.dumps(value)
        except Exception:  # a lambda, a lock, an open file: another process gets what the message shows
            value = _Shown(shown(value))
        return type(self), (self.field, value, self.allowed, self.hint)


class RequestTooLargeError(InvalidArgumentError):
    """A request can never run on this engine. It is refused before it is queued."""


class UnknownArgumentError(NanoVLLMError, TypeError):
    """An argument does not exist. The message names the closest one that does."""

    def __init__(self, callee: str, name: str, known: Iterable[str]) -> None:
        self._arguments = callee, name, tuple(known)
        nearest = difflib.get_close_matches(name, self._arguments[2], n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        super().__init__(f"{callee} has no argument {name!r}.{hint}")

    def __reduce__(self) -> tuple[type[UnknownArgumentError], tuple[str, str, tuple[str, ...]]]:
        return type(self), self._arguments


class ModelLoadError(NanoVLLMError):
    """A checkpoint is missing, is incomplete, has weights that are not used, or has an unsupported architecture."""


class NotSupportedError(NanoVLLMError, AttributeError):
    """A method of vLLM does not exist here. `hasattr` is False for it. The message says what to do instead."""


class OutOfMemoryError(NanoVLLMError, RuntimeError):
    """The device has too little memory. The message has the numbers and the settings to change.

    It begins with "out of memory", which scripts look for in torch's errors.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        super().__init__(f"out of memory: {message}")

    def __reduce__(self) -> tuple[type[OutOfMemoryError], tuple[str]]:
        return type(self), (self._message,)


class BackendUnavailableError(NanoVLLMError):
    """The requested attention backend cannot run here. The message says why."""


class InvalidStateError(NanoVLLMError, RuntimeError):
    """A call is not possible in the current state, such as a stop without a start."""


class InvalidLogitsError(NanoVLLMError):
    """The model's logits for a request are NaN or infinite. It ends there; the engine and the others continue."""

    def __init__(
        self,
        message: str = "The model's logits are NaN or infinite, so no token can be drawn: its weights hold NaN or "
        "infinity, or values overflow. Check its files, or try dtype='float32' and kv_cache_dtype='auto'.",
    ) -> None:
        super().__init__(message)


class StepFailedError(NanoVLLMError):
    """A step failed and its requests are aborted. The engine continues. `__cause__` is the error of the step."""

    @classmethod
    def after(cls, cause: BaseException) -> StepFailedError:
        """Returns the error of a request that was lost in a step which `cause` ended."""
        error = cls(f"A step failed ({cause!r}), and with it this request; the engine goes on.")
        error.__cause__ = cause
        return error


class ChannelError(NanoVLLMError):
    """A message between two processes was not read in time, or is not valid."""


class WorkerError(NanoVLLMError):
    """The process of rank `rank` died, failed, or did not start in time. `traceback` is the text of its traceback."""

    def __init__(self, rank: int, problem: str, traceback: str = "") -> None:
        self.rank = rank
        self.problem = problem
        self.traceback = traceback
        super().__init__(f"Rank {rank} {problem}" + (f"\n\nOn rank {rank}:\n{traceback}" if traceback else ""))

    def __reduce__(self) -> tuple[type[WorkerError], tuple[int, str, str]]:
        return type(self), (self.rank, self.problem, self.traceback)


class ReplicaLostError(NanoVLLMError):
    """The replica that ran a request has ended. The other replicas continue, and it is started again."""

    @classmethod
    def after(cls, replica: int, cause: BaseException) -> ReplicaLostError:
        """Returns the error of a request that was lost with a replica which `cause` ended."""
        error = cls(f"Replica {replica} has ended ({cause}), and with it this request; send it again.")
        error.__cause__ = cause
        return error


class EngineDeadError(NanoVLLMError):
    """The engine has ended, and its requests are aborted. If a step failed on the device, `__cause__` is the error."""

    @classmethod
    def after(cls, cause: BaseException) -> EngineDeadError:
        """Returns the error of a call to an engine that `cause` ended."""
        error = cls(f"This engine has ended ({cause}): make a new one.")
        error.__cause__ = cause
        return error


def checks_argument_names(cls: type[T]) -> type[T]:
    """Class decorator that makes an unknown keyword raise UnknownArgumentError, which names the closest known one."""
    original: Any = cls.__init__
    known = dict.fromkeys(list(inspect.signature(original).parameters)[1:])

    @functools.wraps(original)
    def checked(self: T, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                raise UnknownArgumentError(cls.__name__, name, known)
        original(self, *args, **kwargs)

    setattr(cls, "__init__", checked)  # noqa: B010 - an assignment would need the class's own signature
    return cls
