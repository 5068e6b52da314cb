"""Arguments declared once: a dataclass field with its default, the values it allows, and its help text.

    @dataclass(frozen=True)
    class Options:
        max_num_seqs: int = argument(512, COUNT, "Sequences that run at the same time.")

        def __post_init__(self) -> None:
            check_arguments(self)

From these fields come the checks with their errors, the text of `help()` and the tables in docs/api.md.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable, Hashable, Iterator
from dataclasses import MISSING, dataclass, field
from numbers import Integral, Real
from typing import Any, TypeVar

from nanovllm.errors import InvalidArgumentError

__all__ = [
    "COUNT",
    "SWITCH",
    "Argument",
    "Rule",
    "argument",
    "arguments_doc",
    "arguments_of",
    "check_arguments",
    "choice",
    "declaration",
    "is_boolean",
    "is_integer",
    "is_number",
    "lists_arguments",
]

T = TypeVar("T")
_KEY = "argument"  # of a field's metadata


@dataclass(frozen=True)
class Rule:
    """The values that an argument allows.

    allowed: completes "it must be …" in the error.
    accepts: whether a value is allowed.
    convert: makes the value that the field keeps of one that is allowed.
    hint: what to do instead, at the end of the error.
    """

    allowed: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], Any] | None = None
    hint: str = ""

    def or_none(self, meaning: str = "") -> Rule:
        """Returns the same rule, which also allows None; `meaning` says what None stands for."""
        convert = self.convert
        return Rule(
            f"{self.allowed}, or None{meaning}",
            lambda value: value is None or self.accepts(value),
            convert and (lambda value: None if value is None else convert(value)),
            self.hint,
        )


@dataclass(frozen=True)
class Argument:
    """One declared argument."""

    name: str
    default: object  # dataclasses.MISSING: no default
    rule: Rule
    help: str


def argument(default: T, rule: Rule, help: str, *, hash: bool | None = None) -> T:
    """Declares a dataclass field with a default."""
    declared: T = field(default=default, hash=hash, metadata=declaration(rule, help))
    return declared


def declaration(rule: Rule, help: str) -> dict[str, Any]:
    """Returns the metadata of a declared field without a default, `x: int = field(metadata=declaration(…))`.

    Type checkers treat a field as required only if they see `dataclasses.field` itself.
    """
    return {_KEY: (rule, help)}


def arguments_of(cls: type) -> Iterator[Argument]:
    """Yields the declared arguments of a dataclass in order, including `InitVar` ones."""
    for each in cls.__dataclass_fields__.values():  # type: ignore[attr-defined]  # dataclasses.fields() omits InitVar
        if _KEY in each.metadata:
            yield Argument(each.name, each.default, *each.metadata[_KEY])


def check_arguments(instance: Any, prefix: str = "") -> None:
    """Checks each declared field and stores the converted values.

    Raises InvalidArgumentError, which names the field after `prefix`, for the first value that is not allowed.
    """
    for name, default, rule in _rules_of(instance.__class__):
        value = getattr(instance, name)
        if value is default:  # most arguments of most requests: a default is allowed and not converted
            continue
        if not rule.accepts(value):
            raise InvalidArgumentError(prefix + name, value, rule.allowed, rule.hint)
        if rule.convert is not None:
            object.__setattr__(instance, name, rule.convert(value))


@functools.cache
def _rules_of(cls: Hashable) -> list[tuple[str, object, Rule]]:
    """Returns the name, default and rule of each declared field of a dataclass."""
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # the cache takes any hashable, not a dataclass
    return [(each.name, each.default, each.metadata[_KEY][0]) for each in fields if _KEY in each.metadata]


def arguments_doc(cls: type) -> str:
    """Returns the text for `help()`: each declared argument with its default, its meaning and the values it allows."""
    entries = []
    for each in arguments_of(cls):
        head = each.name if each.default is MISSING else f"{each.name} = {each.default!r}"
        text = f"{each.help} Allowed: {each.rule.allowed}."
        entries.append(head + "\n" + textwrap.fill(text, 110, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(entries)


def lists_arguments(cls: type[T]) -> type[T]:
    """Class decorator: adds the declared arguments to the docstring."""
    cls.__doc__ = f"{inspect.getdoc(cls)}\n\n{arguments_doc(cls)}"
    return cls


def is_integer(value: object) -> bool:
    """Returns whether the value is an integer, Python's or NumPy's. One that Python refuses to print is none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        return False
    return int(value).bit_length() <= 4096


def is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def is_boolean(value: object) -> bool:
    """Returns whether the value is a boolean, Python's or NumPy's, which is not imported for it."""
    kind = type(value)
    return kind is bool or (kind.__module__, kind.__name__) in (("numpy", "bool"), ("numpy", "bool_"))


def choice(*allowed: object) -> Rule:
    return Rule("one of " + ", ".join(map(repr, allowed)), lambda value: value in allowed)


COUNT = Rule("an integer ≥ 1", lambda value: is_integer(value) and value >= 1, int)
SWITCH = Rule("True or False", is_boolean, bool)
