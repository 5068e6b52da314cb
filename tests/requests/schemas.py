"""Draws JSON schemas over all keywords that structured outputs read, most of them with values that fit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = Any

_NUMBERS = (0, 1, -1, 3, 5, 10, -7, 100, 0.5, -0.25, 2.5, 1e3, 12.34, 3.0, 2**70, -(2**65), 0.1)
_VALUES = (0, 1, 1.0, True, None, "a", 'b"\\\n', "", [], {}, {"a": 1}, [1, "x"], 2**80, -3, 0.5, "é😀", "a-b")
_NAMES = ("a", "b", "ab", "x-1", 'q"', "é", "a/b", "c~d")
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_PATTERNS = (
    *("^a+$", "b", '^"\\\\$', "a\nb", "^[^a-z]{1,2}$", "^(ab|c)$|d", "x|^y$", r"\d{2}", r"^\S+$", "^.$", "(?=a)b"),
    *(r"^\W$", "", r'["\\]', r"^\s$", "^(?:a|b$)", r"\bx"),
)
_FORMATS = ("date", "ipv4", "ipv6", "email", "uuid", "date-time", "uri", "foo", "regex", "time", "duration", "hostname")
_REFERENCES = ("#", "#/$defs/A", "#/$defs/a~1b%20c", "#anchored", "#/$defs/A/properties/v")
_COMBINED = ("anyOf", "allOf", "oneOf", "$ref")


def draw_schema(draw: random.Random) -> Schema:
    """Returns a schema with definitions that it may refer to."""
    schema = _schema(draw, 0)
    schema["$defs"] = {
        "A": {"type": "object", "properties": {"v": _schema(draw, 1)}},
        "a/b c": _schema(draw, 1),
        "B": {"$anchor": "anchored", "type": draw.choice(("integer", "array"))},
    }
    return schema


def _schema(draw: random.Random, depth: int) -> Schema:
    if depth >= 3:
        return draw.choice((True, {"type": "integer"}, {"type": "string", "maxLength": 2}, {}))
    schema: dict[str, Any] = {}

    def sometimes(keyword: str, chance: float, value: Callable[[], Any]) -> None:
        if draw.random() < chance:
            schema[keyword] = value()

    def below() -> Schema:
        return _schema(draw, depth + 1)

    def one_of(*values: Any) -> Callable[[], Any]:
        return lambda: draw.choice(values)

    def some_of(values: tuple[str, ...], least: int, most: int) -> list[str]:
        return draw.sample(values, draw.randint(least, most))

    kind = draw.choice((*_TYPES, "several", "enum", "const", "any", *_COMBINED, *_COMBINED))
    if kind in _TYPES:
        sometimes("type", 0.9, lambda: kind)
    if kind == "several":
        schema["type"] = some_of(_TYPES, 1, 3)
    if kind == "object" or (kind in ("several", *_COMBINED) and draw.random() < 0.4):
        sometimes("properties", 0.85, lambda: {name: below() for name in some_of(_NAMES, 0, 3)})
        sometimes("required", 0.35, lambda: some_of((*_NAMES[:5], "zz"), 0, 2))
        sometimes("additionalProperties", 0.4, one_of(True, False, {"type": "integer"}, {"type": "string"}))
        sometimes("minProperties", 0.15, one_of(0, 1, 2, 3.0))
        sometimes("maxProperties", 0.15, one_of(0, 1, 2, 5))
        sometimes("patternProperties", 0.15, lambda: {draw.choice(("^x-", "a", "^[0-9]+$")): below()})
        sometimes("propertyNames", 0.1, one_of({"maxLength": 3}, {"pattern": "^[a-z]+$"}, {"enum": ["a", "qq"]}, True))
        sometimes("unevaluatedProperties", 0.1, one_of(False, True, {"type": "integer"}))
        sometimes("dependentRequired", 0.1, one_of({}, {"a": ["b"]}))
    if kind == "array" or (kind == "several" and draw.random() < 0.4):
        sometimes("items", 0.6, below)
        sometimes("prefixItems", 0.25, lambda: [below() for _ in range(draw.randint(1, 2))])
        sometimes("minItems", 0.3, one_of(0, 1, 2, 2.0))
        sometimes("maxItems", 0.4, one_of(0, 1, 2, 3))
        sometimes("uniqueItems", 0.05, one_of(False, True))
        sometimes("contains", 0.03, below)
        sometimes("unevaluatedItems", 0.1, one_of(False, True, {"type": "integer"}))
    if kind in ("string", "several"):
        sometimes("minLength", 0.3, one_of(0, 1, 2, 3.0))
        sometimes("maxLength", 0.4, one_of(0, 1, 3, 8, 40))
        sometimes("pattern", 0.3, one_of(*_PATTERNS))
        sometimes("format", 0.15, one_of(*_FORMATS))
    if kind in ("number", "integer", "several"):
        for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            sometimes(keyword, 0.25, one_of(*_NUMBERS))
        sometimes("multipleOf", 0.15, one_of(1, 2, 3, 7, 0.5, 2.0, 10, 1000))
    sometimes("enum", 1 if kind == "enum" else 0.07, lambda: [draw.choice(_VALUES) for _ in range(draw.randint(1, 4))])
    sometimes("const", 1 if kind == "const" else 0.05, one_of(*_VALUES))
    if kind == "$ref":
        schema["$ref"] = draw.choice(_REFERENCES)
    elif kind in _COMBINED:
        schema[kind] = [below() for _ in range(draw.randint(1, 3))]
    sometimes("title", 0.1, lambda: "ignored")
    sometimes("not", 0.02, one_of(False, {"type": "string"}))
    return schema
