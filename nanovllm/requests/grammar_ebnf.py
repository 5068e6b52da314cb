"""Pieces of xgrammar's EBNF: texts, sets of characters, digits."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

Ranges = tuple[tuple[int, int], ...]  # of code points, sorted, apart, each with both ends

ANY: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))  # without surrogates, which no text has
ESCAPED_IN_JSON: Ranges = ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C))
_MAX_DEPTH = 50  # of parentheses in an expression of texts
_SHORT_ESCAPES = {0x22: '"', 0x5C: "\\", 8: "b", 9: "t", 10: "n", 12: "f", 13: "r"}


_TEXTS = re.compile(r'"(?:[^"\\\n]|\\.)*"|\[(?:[^\]\\\n]|\\.)*\]|#[^\n]*')


class UnenforceableError(ValueError):
    """A schema, regex or grammar asks for what no grammar here can enforce. The message says what to do instead."""


def without_lookahead(grammar: str) -> str:
    """Returns a grammar of a request. Raises UnenforceableError if it looks ahead, which xgrammar ignores."""
    if "(=" in _TEXTS.sub("", grammar):
        raise UnenforceableError("Lookahead is not supported: '(=' would be ignored")
    return grammar


def literal(text: str) -> str:
    """Returns the expression of exactly this text. Raises UnicodeEncodeError for surrogates."""
    text.encode()
    return f'"{"".join(map(_character, map(ord, text)))}"'


def characters(ranges: Ranges) -> str:
    """Returns the expression of one character of a set."""
    if not ranges:
        raise UnenforceableError("a set without any character fits no text")
    return f"[{''.join(_character(low) + (f'-{_character(high)}' if high > low else '') for low, high in ranges)}]"


def json_characters(ranges: Ranges) -> str:
    """Returns the expression of one character of a set as JSON writes it inside a string."""
    plain = intersect(ranges, complement(ESCAPED_IN_JSON))
    codes = [code for low, high in intersect(ranges, ESCAPED_IN_JSON) for code in range(low, high + 1)]
    if plain:  # the other control characters, which no one expects of a set, would be an option each
        codes = [code for code in codes if code in _SHORT_ESCAPES]
    texts = [literal("\\" + _SHORT_ESCAPES.get(code, f"u{code:04x}")) for code in codes]
    return either([*([characters(plain)] if plain or not texts else ()), *texts])


def either(options: Iterable[str]) -> str:
    """Returns the expression of any one of `options`."""
    options = list(dict.fromkeys(options))
    return options[0] if len(options) == 1 else f"({' | '.join(options)})"


def any_of(texts: Iterable[str], depth: int = 0) -> str:
    """Returns the expression of any one of `texts`. Common beginnings are written once, to be followed fast."""
    groups: dict[str, list[str]] = {}
    for text in dict.fromkeys(texts):
        groups.setdefault(text[:1], []).append(text)
    options = []
    for members in groups.values():
        prefix = _beginning(min(members), max(members)) if len(members) > 1 and depth < _MAX_DEPTH else ""
        if prefix:
            options.append(f"{literal(prefix)} {any_of((text[len(prefix) :] for text in members), depth + 1)}")
        else:
            options += map(literal, members)
    return either(options)


def _beginning(one: str, other: str) -> str:
    """Returns what both texts begin with."""
    return "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def repeated(expression: str, least: int, most: int | None) -> str:
    """Returns the expression of `least` to `most` (None: any number) in a row."""
    if most == 0:
        return '""'
    if (least, most) == (1, 1):
        return expression
    if most is None and least <= 1:
        return f"({expression}){'+' if least else '*'}"
    return f"({expression}){{{least},{'' if most is None else most}}}"


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return tuple(merged)


def complement(ranges: Ranges) -> Ranges:
    gaps, start = [], 0
    for low, high in (*ranges, (0x110000, 0x110000)):
        if start < low:
            gaps.append((start, low - 1))
        start = high + 1
    return intersect(tuple(gaps), ANY)


def intersect(one: Ranges, other: Ranges) -> Ranges:
    both = [(max(a, c), min(b, d)) for a, b in one for c, d in other]
    return union((low, high) for low, high in both if low <= high)


def _character(code: int) -> str:
    if code < 128 and chr(code).isalnum():
        return chr(code)
    return f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"
