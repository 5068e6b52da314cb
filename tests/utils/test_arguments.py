"""Declared arguments: checks and conversions, help text, and what `arguments_of` lists."""

from __future__ import annotations

import dataclasses
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Any

import pytest

from nanovllm.errors import InvalidArgumentError
from nanovllm.utils.arguments import (
    COUNT,
    SWITCH,
    Rule,
    argument,
    arguments_of,
    check_arguments,
    choice,
    declaration,
    lists_arguments,
)

WORD = Rule("a word", lambda value: isinstance(value, str) and value.isalpha(), str.lower, hint="Use letters.")


@lists_arguments
@dataclass(frozen=True)
class Options:
    """Options of a test."""

    word: str = field(metadata=declaration(WORD, "The word."))
    _: KW_ONLY
    other: str | None = argument(None, WORD.or_none(" for no word"), "Another word.")
    size: int = argument(3, COUNT, "Its size.")
    loud: bool = argument(False, SWITCH, "Whether it is loud.")
    colour: str = argument("red", choice("red", "blue"), "Its colour.")
    length: InitVar[int | None] = argument(None, COUNT.or_none(), "Another name of size.")
    plain: int = 0  # not declared

    def __post_init__(self, length: int | None) -> None:
        check_arguments(self, prefix="options.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"word": "a b"}, "options.word='a b' is not allowed: it must be a word. Use letters."),
        ({"other": 5}, "options.other=5 is not allowed: it must be a word, or None for no word. Use letters."),
        ({"size": True}, "options.size=True is not allowed: it must be an integer ≥ 1."),
        ({"loud": 0}, "options.loud=0 is not allowed: it must be True or False."),
        ({"colour": "green"}, "options.colour='green' is not allowed: it must be one of 'red', 'blue'."),
    ],
)
def test_a_value_that_is_not_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Options(**{"word": "a", **arguments})
    assert str(caught.value) == message


def test_allowed_values_are_converted() -> None:
    assert Options("Word", other="Other") == Options("word", other="other")
    assert Options("word", other=None, plain=-1).plain == -1


def test_all_declared_arguments_are_listed() -> None:
    assert [(each.name, each.default) for each in arguments_of(Options)] == [
        ("word", dataclasses.MISSING),
        ("other", None),
        ("size", 3),
        ("loud", False),
        ("colour", "red"),
        ("length", None),
    ]


def test_the_docstring_lists_them() -> None:
    text = Options.__doc__ or ""
    assert text.startswith(
        "Options of a test.\n\nword\n    The word. Allowed: a word.\nother = None\n    Another word."
    )
    assert "colour = 'red'\n    Its colour. Allowed: one of 'red', 'blue'.\n" in text
