"""One tree of exceptions, each also the built-in error that a caller would expect."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest

from nanovllm import errors
from nanovllm.errors import (
    InvalidArgumentError,
    InvalidStateError,
    NanoVLLMError,
    NotSupportedError,
    OutOfMemoryError,
    RequestTooLargeError,
    UnknownArgumentError,
    checks_argument_names,
)

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)]


def test_the_tree_is_the_one_that_the_docstring_draws() -> None:
    assert errors.__doc__ is not None
    drawn = [line.lstrip(" │├└─") for line in errors.__doc__.splitlines() if "Error" in line]
    assert {line.split()[0] for line in drawn} == {cls.__name__ for cls in CLASSES}
    assert all(issubclass(cls, NanoVLLMError) for cls in CLASSES)
    assert {cls for cls in CLASSES if issubclass(cls, ValueError)} == {InvalidArgumentError, RequestTooLargeError}
    assert {cls for cls in CLASSES if issubclass(cls, TypeError)} == {UnknownArgumentError}
    assert {line.split()[0] for line in drawn if "(also" in line} == {
        "InvalidArgumentError",
        "UnknownArgumentError",
        "InvalidStateError",
        "NotSupportedError",
        "OutOfMemoryError",
    }
    assert {cls for cls in CLASSES if issubclass(cls, RuntimeError)} == {InvalidStateError, OutOfMemoryError}
    assert {cls for cls in CLASSES if issubclass(cls, AttributeError)} == {NotSupportedError}
    assert issubclass(RequestTooLargeError, InvalidArgumentError)


def test_every_class_is_exported_and_documented() -> None:
    assert {cls.__name__ for cls in CLASSES} | {"checks_argument_names", "shown"} == set(errors.__all__)
    assert all(cls.__doc__ for cls in CLASSES)


def test_an_invalid_argument_names_field_value_what_is_allowed_and_what_to_do() -> None:
    error = InvalidArgumentError("max_tokens", 0, "an integer ≥ 1", "Leave it out for 64.")
    assert str(error) == "max_tokens=0 is not allowed: it must be an integer ≥ 1. Leave it out for 64."
    assert (error.field, error.value, error.allowed, error.hint) == (
        "max_tokens",
        0,
        "an integer ≥ 1",
        "Leave it out for 64.",
    )
    assert str(InvalidArgumentError("x", "a", "b")) == "x='a' is not allowed: it must be b."


def test_a_long_value_is_cut_in_the_message_and_kept_on_the_error() -> None:
    value = list(range(10_000))
    error = InvalidArgumentError("prompt", value, "shorter")
    assert len(str(error)) < 150
    assert "..." in str(error)
    assert error.value is value


def test_out_of_memory_begins_as_scripts_expect() -> None:
    error = OutOfMemoryError("Lower max_num_seqs.")
    assert str(error) == "out of memory: Lower max_num_seqs."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("cls", [InvalidArgumentError, RequestTooLargeError])
def test_an_invalid_argument_survives_pickling(cls: type[InvalidArgumentError]) -> None:
    error = pickle.loads(pickle.dumps(cls("seed", -1, "≥ 0", "Take another.")))
    assert type(error) is cls
    assert (error.field, error.value, error.hint) == ("seed", -1, "Take another.")
    assert str(error) == "seed=-1 is not allowed: it must be ≥ 0. Take another."


@pytest.mark.parametrize(
    ("given", "nearest"), [("temprature", "temperature"), ("maxtokens", "max_tokens"), ("zzz", None)]
)
def test_an_unknown_argument_names_the_nearest_known_one(given: str, nearest: str | None) -> None:
    error = UnknownArgumentError("SamplingParams", given, ["temperature", "max_tokens"])
    assert isinstance(error, TypeError)
    hint = f" Did you mean {nearest!r}?" if nearest else ""
    assert str(error) == f"SamplingParams has no argument {given!r}.{hint}"


def test_the_decorator_checks_names_before_anything_else_and_changes_nothing_else() -> None:
    @checks_argument_names
    class Point:
        """A point."""

        def __init__(self, x: int, y: int = 2) -> None:
            self.at = (x, y)

    make: Any = Point
    assert (Point(1).at, Point(1, y=3).at, Point(x=5).at) == ((1, 2), (1, 3), (5, 2))
    assert list(inspect.signature(Point).parameters) == ["x", "y"]
    with pytest.raises(UnknownArgumentError, match="Point has no argument 'xx'"):
        make(xx=1)
    with pytest.raises(TypeError) as caught:
        make()  # a missing one is Python's own error
    assert not isinstance(caught.value, NanoVLLMError)
