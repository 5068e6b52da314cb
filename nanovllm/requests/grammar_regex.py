"""Reads regular expressions in Python's syntax into EBNF. Refuses what a grammar cannot express."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from nanovllm.requests.grammar_ebnf import (
    ANY,
    Ranges,
    UnenforceableError,
    characters,
    complement,
    either,
    intersect,
    repeated,
    union,
)

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

_BEGINNINGS, _ENDS = ("AT_BEGINNING", "AT_BEGINNING_STRING"), ("AT_END", "AT_END_STRING")
# ASCII alone, so that an output matches in Python and in JavaScript.
_CATEGORIES: dict[str, Ranges] = {
    "DIGIT": ((0x30, 0x39),),
    "SPACE": ((9, 13), (32, 32)),
    "WORD": ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
}
_PUNCTUATION: Ranges = ((0x2010, 0x205E), (0x3001, 0x3003), (0x3008, 0x3011))  # beyond ASCII, and far from all of it
_NOT_REGULAR = {
    "ASSERT": "Lookahead is not supported, nor lookbehind",
    "ASSERT_NOT": "Lookahead is not supported, nor lookbehind",
    "GROUPREF": "A reference to a group is not supported",
    "GROUPREF_EXISTS": "A reference to a group is not supported",
    "ATOMIC_GROUP": "An atomic group is not supported",
    "POSSESSIVE_REPEAT": "A possessive repetition is not supported",
}


class Regex(NamedTuple):
    """A regex as EBNF. least, most: lengths of the texts that match; `most` is very large if there is no maximum."""

    expression: str
    least: int
    most: int


_UNLIMITED = 2**31


def read_regex(pattern: str, write: Callable[[Ranges], str] = characters, *, search: bool = False) -> Regex:
    """Reads a regex that the whole text matches, or with `search` some part of it.

    write: returns the expression of one character of a set. `.` matches all but a newline.
    Raises UnenforceableError and `re.error`.
    """
    pattern.encode()
    try:
        parsed = _parser.parse(pattern)
    except re.error:
        parsed = _parser.parse(re.sub(r"\(\?<(?=[A-Za-z_])", "(?P<", pattern))  # JavaScript's named groups
    if parsed.state.flags & ~re.UNICODE:
        raise UnenforceableError("Flags are not supported: write out what they mean")
    writer = _Writer(write)
    fill = repeated(write(ANY), 0, None) if search else ""
    expression = writer.sequence(parsed, fill, fill)
    least, most = map(int, parsed.getwidth())
    return Regex(expression, least, _UNLIMITED if writer.filled else most)


class _Writer:
    """Writes parsed regexes."""

    def __init__(self, write: Callable[[Ranges], str]) -> None:
        self._write = write
        self.filled = False  # whether the texts that match are longer than what the regex says

    def sequence(self, items: Any, before: str | None, after: str | None) -> str:
        """Returns the expression of items in a row.

        before, after: at the beginning and the end of the regex, what may stand there unless there is an anchor; None
        inside of it, where no anchor may be.
        """
        items = list(items)
        while before is not None and items and _is_anchor(items[0], _BEGINNINGS):
            before = ""
            del items[0]
        while after is not None and items and _is_anchor(items[-1], _ENDS):
            after = ""
            del items[-1]
        if not items:
            before = before and after
            self.filled |= bool(before)
            return before or '""'
        last = len(items) - 1
        return " ".join(
            self._item(op.name, value, before if index == 0 else None, after if index == last else None)
            for index, (op, value) in enumerate(items)
        )

    def _item(self, name: str, value: Any, before: str | None, after: str | None) -> str:
        if name == "BRANCH":
            return either(self.sequence(branch, before, after) for branch in value[1])
        if name == "SUBPATTERN":
            _, added, removed, items = value
            if added or removed:
                raise UnenforceableError("Flags are not supported: write out what they mean")
            return f"({self.sequence(items, before, after)})"
        self.filled |= bool(before or after)
        return f"{before or ''} {self._single(name, value)} {after or ''}".strip()

    def _single(self, name: str, value: Any) -> str:
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, items = value
            inner = self.sequence(items, None, None)
            return repeated(inner, least, None if most is _parser.MAXREPEAT else most)
        if name == "AT":
            raise UnenforceableError(
                "An anchor inside a regex, or a word boundary, is not supported: put ^ and $ at its ends"
            )
        if name in _NOT_REGULAR:
            raise UnenforceableError(f"{_NOT_REGULAR[name]}: no grammar can express it")
        return self._write(_set_of(name, value))


def _is_anchor(item: Any, anchors: tuple[str, ...]) -> bool:
    op, value = item
    return op.name == "AT" and value.name in anchors


def _set_of(name: str, value: Any) -> Ranges:
    """Returns the characters that a one-character item of a parsed regex matches."""
    if name == "LITERAL":
        return intersect(((value, value),), ANY)
    if name == "NOT_LITERAL":
        return complement(((value, value),))
    if name == "ANY":
        return complement(((10, 10),))
    if name == "RANGE":
        return intersect((value,), ANY)
    if name == "CATEGORY":
        kind = value.name.removeprefix("CATEGORY_")
        return complement(_all_of(kind[4:])) if kind.startswith("NOT_") else _CATEGORIES[kind]
    assert name == "IN", name
    negated = value[0][0].name == "NEGATE"
    members = [(op.name, member) for op, member in value if op.name != "NEGATE"]
    if not negated:
        return union(pair for member in members for pair in _set_of(*member))
    excluded = [
        _all_of(member.name.removeprefix("CATEGORY_"))
        if op == "CATEGORY" and "NOT_" not in member.name
        else complement(_CATEGORIES[member.name.removeprefix("CATEGORY_NOT_")])
        if op == "CATEGORY"
        else _set_of(op, member)
        for op, member in members
    ]
    return complement(union(pair for ranges in excluded for pair in ranges))


@cache
def _all_of(kind: str) -> Ranges:
    """Returns every character of a category, in Python or in JavaScript, and of words more, since they are so many."""
    if kind == "WORD":
        return union([*_CATEGORIES["WORD"], *intersect(complement(_PUNCTUATION), ((0x80, 0x10FFFF),))])
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    escape = {"DIGIT": r"\d+", "SPACE": "[\\s\ufeff]+"}[kind]
    return union((match.start(), match.end() - 1) for match in re.finditer(escape, every))
