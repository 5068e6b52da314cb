"""Writes JSON schemas as EBNF."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

from nanovllm.requests.grammar_ebnf import (
    ESCAPED_IN_JSON,
    UnenforceableError,
    any_of,
    characters,
    complement,
    either,
    intersect,
    json_characters,
    literal,
    repeated,
    union,
)
from nanovllm.requests.grammar_numbers import INTEGER, NUMBER, integers, multiples, numbers
from nanovllm.requests.grammar_regex import Regex, read_regex
from nanovllm.requests.grammar_schema import Part, Schema, SchemaReader, is_closed, kinds, matches

_MAX_GRAMMAR = 2**21  # characters of EBNF
_HEX = "[0-9a-fA-F]"
_ESCAPE = f'"\\\\" (["\\\\/bfnrt] | "u" ([0-9a-cefA-CEF] {_HEX} | [dD] [0-7]) {_HEX} {_HEX})'  # no surrogates
_PLAIN = complement(ESCAPED_IN_JSON)
_CHARACTER = f"({characters(_PLAIN)} | {_ESCAPE})"

_DAY = "(?:0[1-9]|1[0-9]|2[0-8])"
_LEAP_YEAR = "[1-9][0-9](?:0[48]|[2468][048]|[13579][26])"  # centuries apart
_MONTHS = "(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
_DATE = f"(?:[1-9][0-9]{{3}}-{_MONTHS}|{_LEAP_YEAR}-02-29)"
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,60}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL}){{0,3}}"
_BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IN_PATH = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-F]{2})"
_REST = rf"(?:/{_IN_PATH}*)*(?:\?(?:{_IN_PATH}|[/?])*)?(?:#(?:{_IN_PATH}|[/?])*)?"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": r"P(?:\d+W|\d+D|\d+M(?:\d+D)?|\d+Y(?:\d+M(?:\d+D)?)?|T(?:\d+S|\d+M(?:\d+S)?|\d+H(?:\d+M(?:\d+S)?)?))",
    "email": rf"[A-Za-z0-9_%+-]+(?:\.[A-Za-z0-9_%+-]+)*@{_HOST}",
    "hostname": _HOST,
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "ipv6": "(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}",
    "uuid": "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "uri": rf"[A-Za-z][A-Za-z0-9+.-]*://{_HOST}(?::[1-9]\d{{0,3}})?{_REST}",
    "uri-reference": _REST,
    "json-pointer": "(?:/(?:[^~/]|~[01])*)*",
}
_OTHER_FORMATS = ("idn-email", "idn-hostname", "iri", "iri-reference", "uri-template", "relative-json-pointer", "regex")


def json_grammar(schema: Schema, *, any_whitespace: bool) -> str:
    """Returns the EBNF of the JSON texts that fit a schema. Raises UnenforceableError if no grammar can enforce it."""
    writer = _JSONWriter(schema, any_whitespace)
    root = writer.rule(schema)
    if root is None:
        raise UnenforceableError("no value fits it")
    return "\n".join([f"root ::= {root}", *(f"{name} ::= {body}" for name, body in writer.rules.items())])


class _JSONWriter:
    """Collects the rules of one grammar. An expression of None stands for a schema that no value fits."""

    def __init__(self, schema: Schema, any_whitespace: bool) -> None:
        self._reader = SchemaReader(schema)
        self._names: dict[str, str] = {}  # schema as JSON → its rule
        self._size = 0
        self._space = "space" if any_whitespace else '""'
        self._comma, self._colon = ('space "," space', 'space ":" space') if any_whitespace else ('", "', '": "')
        self.rules = {
            "space": "[ \\n\\t\\r]*",
            "string": f'"\\"" {_CHARACTER}* "\\""',
            "value": 'object | array | string | number | "true" | "false" | "null"',
            "number": NUMBER,
            "array": self._list("value", 0, None),
            "object": self._braces(f"(member ({self._comma} member)* {self._space})?"),
            "member": f"string {self._colon} value",
        }

    def rule(self, schema: Schema) -> str | None:
        """Returns the name of a schema's rule."""
        key = json.dumps(schema)
        if key not in self._names:
            self._names[key] = name = f"s{len(self._names)}"
            self.rules[name] = ""  # in the order of reading
            parts = self._reader.parts(schema)
            options = [option for part in parts for option in self._options(part)]
            if not options:
                self._names[key] = ""
                del self.rules[name]
            else:
                self._add(name, either(options))
        return self._names[key] or None

    def _add(self, name: str, body: str) -> str:
        self.rules[name] = body
        self._size += len(body)
        if self._size > _MAX_GRAMMAR:
            raise UnenforceableError(f"A schema whose grammar has more than {_MAX_GRAMMAR} characters is not supported")
        return name

    def _options(self, part: Part) -> list[str]:
        if "enum" in part:
            texts = [_text(value) for value in part["enum"] if not isinstance(value, (list, dict))]
            values = [self._value(value) for value in part["enum"] if isinstance(value, (list, dict))]
            return [*([any_of(texts)] if texts else ()), *values]
        write: dict[str, Callable[[Part], str | None]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "number": self._number,
            "integer": self._integer,
            "boolean": lambda part: '("true" | "false")',
            "null": lambda part: '"null"',
        }
        return [option for kind in kinds(part) if (option := write[kind](part)) is not None]

    def _value(self, value: Any) -> str:
        """Returns the expression of one value."""
        if value and isinstance(value, list):
            return f'"[" {self._space} {f" {self._comma} ".join(map(self._value, value))} {self._space} "]"'
        if value and isinstance(value, dict):
            members = [f"{self._value(name)} {self._colon} {self._value(each)}" for name, each in value.items()]
            return self._braces(f"{f' {self._comma} '.join(members)} {self._space}")
        return literal(_text(value))

    # Numbers

    def _integer(self, part: Part) -> str | None:
        low = [math.ceil(part["minimum"])] if "minimum" in part else []
        low += [math.floor(part["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in part else []
        high = [math.floor(part["maximum"])] if "maximum" in part else []
        high += [math.ceil(part["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in part else []
        least, most = max(low, default=None), min(high, default=None)
        divisor = part.get("multipleOf", 1)
        if not isinstance(divisor, int):
            raise UnenforceableError(
                f"'multipleOf': {divisor} cannot be enforced, since fractions are rounded: ask for integers, and divide"
            )
        if divisor > 1:
            return multiples(divisor, least, most, self.rules)
        return INTEGER if least is most is None else integers(least, most)

    def _number(self, part: Part) -> str | None:
        if "multipleOf" in part:
            return self._integer(part)
        bounds = []
        for including, excluding, tighter in (
            ("minimum", "exclusiveMinimum", max),
            ("maximum", "exclusiveMaximum", min),
        ):
            values = [(_exact(part[name]), name == excluding) for name in (including, excluding) if name in part]
            bound = tighter((value for value, _ in values), default=None)
            bounds.append((bound, (bound, True) in values))
        (low, over), (high, under) = bounds
        return numbers(low, high, over=over, under=under)

    # Strings

    def _string(self, part: Part) -> str | None:
        least, most = part.get("minLength", 0), part.get("maxLength")
        if most is not None and most < least:
            return None
        expression = self._pattern(part, least, most)
        if expression is None:
            if not least and most is None:
                return "string"
            expression = repeated(_CHARACTER, least, most)
        return f'"\\"" {expression} "\\""'

    def _pattern(self, part: Part, least: int, most: int | None) -> str | None:
        """Returns the expression of a string's pattern or format; None if it has none."""
        regexes: dict[str, Regex] = {}
        if "pattern" in part:
            regexes["pattern"] = read_regex(part["pattern"], json_characters, search=True)
        if part.get("format") in _FORMATS:
            regexes["format"] = read_regex(_FORMATS[part["format"]], json_characters)
        elif part.get("format") in _OTHER_FORMATS:
            raise UnenforceableError(f"'format': {part['format']!r} cannot be enforced: write a pattern instead")
        if not regexes:
            return None
        keyword, regex = regexes.popitem()
        if regexes:
            raise UnenforceableError("'format' with 'pattern' cannot be enforced: write one pattern for both")
        if regex.least < least or (most is not None and regex.most > most):
            raise UnenforceableError(
                f"{keyword!r} with 'minLength' or 'maxLength' cannot be enforced where it allows other lengths: write "
                "them into a pattern, such as ^[a-z]{1,8}$"
            )
        return regex.expression

    # Arrays

    def _array(self, part: Part) -> str | None:
        prefix, least, most = part.get("prefixItems", []), part.get("minItems", 0), part.get("maxItems")
        if most is not None:
            prefix = prefix[:most]
        item = self.rule(part.get("items", not prefix or least > len(prefix)))
        first = [self.rule(each) for each in prefix]
        if None in first:
            first, item = first[: first.index(None)], None
        if item is None:
            most = len(first)
        if most is not None and most < least:
            return None
        if not first:
            return self._list(item, least, most)
        left = None if most is None else most - len(first)
        more = repeated(f"{self._comma} {item}", max(least - len(first), 0), left)
        return f'"[" {self._space} {f" {self._comma} ".join(map(str, first))} {more} {self._space} "]"'

    def _list(self, item: str | None, least: int, most: int | None) -> str:
        """Returns the expression of an array of equal items."""
        if most == 0:
            return f'"[" {self._space} "]"'
        more = repeated(f"{self._comma} {item}", max(least - 1, 0), None if most is None else most - 1)
        return f'"[" {self._space} ({item} {more} {self._space}){"" if least else "?"} "]"'

    # Objects

    def _object(self, part: Part) -> str | None:
        named, required = self._named(part), part.get("required", [])
        other = self._other(part, named)
        least, most = part.get("minProperties", 0), part.get("maxProperties")
        if other is not None and least > len(named) + 1:
            raise UnenforceableError(
                f"'minProperties': {least} cannot be enforced, as names may repeat: name and require the properties"
            )
        after = [self._end(count, other, least, most) for count in range(len(named) + 1)]  # by how many are written
        for index, (name, schema) in reversed(list(enumerate(named.items()))):
            value = self.rule(schema)
            pair = None if value is None else f"{self._value(name)} {self._colon} {value}"
            before: list[str | None] = []
            for count in range(index + 1 if least > 1 or most is not None else min(index, 1) + 1):
                options = [] if name in required else [after[count]]
                if pair is not None and (most is None or count < most):
                    rest = after[min(count + 1, len(after) - 1)]
                    options.append(rest and f"{f'{self._comma} ' if count else ''}{pair} {rest}")
                known = [option for option in options if option is not None]
                before.append(self._add(f"f{len(self.rules)}", " | ".join(known)) if known else None)
            after = before
        return after[0] and self._braces(after[0])

    def _braces(self, members: str) -> str:
        return f'"{{" {self._space} {members} "}}"'

    def _end(self, count: int, other: str | None, least: int, most: int | None) -> str | None:
        """Returns the end of an object of which `count` named properties are written. other: what else may come."""
        options = [self._space if count else '""'] if count >= least else []
        if other is not None and count + 1 >= least and (most is None or count < most):
            more = repeated(f"{self._comma} {other}", 0, None if most is None else most - count - 1)
            options.append(f"{f'{self._comma} ' if count else ''}{other} {more} {self._space}")
        return either(options) if options else None

    def _named(self, part: Part) -> dict[str, Schema]:
        """Returns the properties that the schema names, with what their values must fit."""
        patterns, names = part.get("patternProperties", {}), part.get("propertyNames", True)
        named: dict[str, Schema] = dict(part.get("properties", {}))
        for name in part.get("required", []):
            if name not in named:
                named[name] = part.get("additionalProperties", True) if not patterns else True
        for name in named:
            for pattern in patterns:
                if matches(pattern, name):
                    raise UnenforceableError(
                        f"'patternProperties': {pattern!r} cannot be enforced beside {name!r}, which it matches: make "
                        "the pattern exclude it"
                    )
            if patterns and name not in part.get("properties", {}) and part.get("additionalProperties") is False:
                named[name] = False
            if names is not True and not self._reader.valid(name, names):
                named[name] = False
        return named

    def _other(self, part: Part, named: dict[str, Schema]) -> str | None:
        """Returns the expression of a property that the schema does not name; None if there is none."""
        patterns, names = part.get("patternProperties", {}), part.get("propertyNames", True)
        other = part.get("additionalProperties", not is_closed(part))
        if patterns:
            values = list(patterns.values())
            if other is not False or names is not True or any(value != values[0] for value in values):
                raise UnenforceableError(
                    "'patternProperties' is enforced with 'additionalProperties': false, without propertyNames, and "
                    "with one schema for all patterns"
                )
            keys = [read_regex(pattern, json_characters, search=True).expression for pattern in patterns]
            key: str | None = f'"\\"" {either(keys)} "\\""'
            value = self.rule(values[0])
        elif (value := self.rule(other)) is None:
            return None
        elif names is True:
            key = self._other_key(named) if named else "string"
        elif named:
            raise UnenforceableError(
                "'propertyNames' beside 'properties' is enforced with 'additionalProperties': false alone"
            )
        else:
            key = self.rule({"allOf": [names, {"type": "string"}]})
        return None if key is None or value is None else f"{key} {self._colon} {value}"

    def _other_key(self, names: Iterable[str]) -> str:
        """Returns the expression of a property's name that is none of `names`. It has no escapes."""
        tree: dict[str, Any] = {}
        for name in names:
            node = tree
            for character in name:
                node = node.setdefault(character, {})
            node["end"] = {}
        self.rules["key"] = f"{characters(_PLAIN)}*"
        return f'"\\"" {self._unlike(tree)} "\\""'

    def _unlike(self, tree: dict[str, Any]) -> str:
        """Returns the rule of the rest of a name that leads to no end in the tree."""
        letters = union((ord(letter), ord(letter)) for letter in tree if letter != "end")
        options = [f"{literal(letter)} {self._unlike(below)}" for letter, below in tree.items() if letter != "end"]
        options.append(f"{characters(intersect(_PLAIN, complement(letters)))} key")
        return self._add(f"k{len(self.rules)}", " | ".join(options if "end" in tree else [*options, '""']))


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _exact(value: Any) -> Fraction:
    return Fraction(repr(value)) if isinstance(value, float) else Fraction(value)
