"""JSON schemas as alternatives: $ref, allOf, anyOf and oneOf are resolved, so that each part has plain keywords alone.

Two tables say what is enforced: `KEYWORDS`, each keyword with the type that it concerns and how two of them merge, and
`_REFUSED`, those that no grammar here can enforce. All others are annotations, or not part of JSON Schema, which says
to ignore them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote

from nanovllm.requests.grammar_ebnf import UnenforceableError

Schema = Any  # a dictionary, True or False
Part = dict[str, Any]  # a schema without $ref, allOf, anyOf, oneOf and const; `type` is a list

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_MAX_PARTS = 20_000


def _same(one: Any, other: Any) -> Any:
    if one != other:
        raise UnenforceableError(f"{json.dumps(one)[:80]} together with {json.dumps(other)[:80]} is not supported")
    return one


def _both(one: Schema, other: Schema) -> Schema:
    return one if one == other or other is True else other if one is True else {"allOf": [one, other]}


def _common_multiple(one: Any, other: Any) -> Any:
    return math.lcm(one, other) if isinstance(one, int) and isinstance(other, int) else _same(one, other)


def _types_of_both(one: list[str], other: list[str]) -> list[str]:
    return [
        kind
        for kind in TYPES
        if all(kind in types or (kind == "integer" and "number" in types) for types in (one, other))
    ]


# Keyword → the type of the values that it concerns (None: any), and how two of them are one.
KEYWORDS: dict[str, tuple[str | None, Callable[[Any, Any], Any]]] = {
    "type": (None, _types_of_both),
    "enum": (None, lambda one, other: [value for value in one if any(_equal(value, each) for each in other)]),
    "minimum": ("number", max),
    "maximum": ("number", min),
    "exclusiveMinimum": ("number", max),
    "exclusiveMaximum": ("number", min),
    "multipleOf": ("number", _common_multiple),
    "minLength": ("string", max),
    "maxLength": ("string", min),
    "pattern": ("string", _same),
    "format": ("string", _same),
    "prefixItems": ("array", _same),  # merged with `items`
    "items": ("array", _both),
    "minItems": ("array", max),
    "maxItems": ("array", min),
    "properties": ("object", _same),  # merged with `additionalProperties`
    "patternProperties": ("object", _same),
    "additionalProperties": ("object", _both),
    "propertyNames": ("object", _both),
    "required": ("object", lambda one, other: list(dict.fromkeys([*one, *other]))),
    "minProperties": ("object", max),
    "maxProperties": ("object", min),
}
# Keyword → its values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "not": (False,),
    "uniqueItems": (False,),
    "contains": (),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "additionalItems": (True,),
    "$dynamicRef": (),
    "$recursiveRef": (),
}
_UNEVALUATED = {"unevaluatedProperties": "additionalProperties", "unevaluatedItems": "items"}


def _equal(one: Any, other: Any) -> bool:
    """Returns whether two JSON values are the same; 1 is 1.0 and not True."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    return bool(one == other)


class SchemaReader:
    """Resolves one document."""

    def __init__(self, root: Schema) -> None:
        from jsonschema import Draft202012Validator, SchemaError
        from referencing import Registry

        try:
            Draft202012Validator.check_schema(root)
        except SchemaError as error:
            raise UnenforceableError(f"{error.message[:200]} (at {error.json_path[:100]})") from None
        self._root = root
        formats = Draft202012Validator.FORMAT_CHECKER
        self._validator = Draft202012Validator(root, registry=Registry(), format_checker=formats)  # fetches nothing
        self._anchors: dict[str, Schema] = {}
        self._index(root)

    def parts(self, schema: Schema, path: tuple[str, ...] = ()) -> list[Part]:
        """Returns schemas of plain keywords, of which a value must fit one; [] if no value fits.

        path: the references that led here.
        """
        if isinstance(schema, bool):
            return [{}] if schema else []
        parts = self._settled(_plain(schema))
        if "$ref" in schema:
            if schema["$ref"] in path:
                raise UnenforceableError(f"'$ref': {schema['$ref']!r} refers to itself")
            parts = self._merged(parts, self.parts(self._resolve(schema["$ref"]), (*path, schema["$ref"])))
        for each in schema.get("allOf", ()):
            parts = self._merged(parts, self.parts(each, path))
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                branches = [self._merged(parts, self.parts(each, path)) for each in schema[keyword]]
                if keyword == "oneOf":
                    self._check_apart(branches)
                parts = [part for branch in branches for part in branch]
        for keyword, meant in _UNEVALUATED.items():
            if keyword in schema:  # what no keyword of this schema and its alternatives has named
                parts = [settled for part in parts for settled in self._settled({meant: schema[keyword], **part})]
        return parts

    def valid(self, value: Any, part: Schema) -> bool:
        """Returns whether a value fits a schema of this document."""
        return bool(self._validator.evolve(schema=part).is_valid(value))

    def _merged(self, some: list[Part], others: list[Part]) -> list[Part]:
        if len(some) * len(others) > _MAX_PARTS:
            raise UnenforceableError(f"More than {_MAX_PARTS} combinations of alternatives are not supported")
        return [part for one in some for other in others for part in self._merge(one, other)]

    def _settled(self, part: Part) -> list[Part]:
        """Returns the part, of an `enum` the values that fit; [] if nothing fits, as far as that is easy to see."""
        if part.get("type") == []:
            return []
        if "enum" not in part:
            return [part]
        rest = {keyword: value for keyword, value in part.items() if keyword != "enum"}
        values = [value for value in part["enum"] if self.valid(value, rest)]
        return [{"enum": values}] if values else []

    def _merge(self, one: Part, other: Part) -> list[Part]:
        """Returns the schema of what fits both parts; [] if nothing does, as far as that is easy to see."""
        merged = {**one, **other}
        for keyword in one.keys() & other.keys() - {"prefixItems", "properties"}:
            merged[keyword] = KEYWORDS[keyword][1](one[keyword], other[keyword])
        _merge_items(one, other, merged)
        _merge_properties(one, other, merged)
        return self._settled(merged)

    def _check_apart(self, branches: list[list[Part]]) -> None:
        """Raises UnenforceableError if a value may fit two branches of a oneOf."""
        for index, branch in enumerate(branches):
            for other in branches[:index]:
                if not all(self._apart(one, another) for one in branch for another in other):
                    raise UnenforceableError(
                        "'oneOf' whose alternatives may overlap cannot be enforced: use anyOf, or give each a required "
                        "property with a const of its own"
                    )

    def _apart(self, one: Part, other: Part) -> bool:
        """Returns whether no output fits both, as far as that is easy to see."""
        if not self._merge(one, other):
            return True
        if kinds(one) != ["object"] or kinds(other) != ["object"]:
            return False
        for key in {*one.get("required", ())} & {*other.get("required", ())}:
            values = [self.parts(part.get("properties", {}).get(key, True)) for part in (one, other)]
            if all(self._apart(a, b) for a in values[0] for b in values[1]):
                return True
        return any({*b.get("required", ())} - written(a) for a, b in ((one, other), (other, one)) if is_closed(a))

    def _resolve(self, reference: str) -> Schema:
        """Returns the schema that a $ref names. Raises UnenforceableError for one outside of the document."""
        base = self._root.get("$id", "") if isinstance(self._root, dict) else ""
        local = reference.removeprefix(base.rstrip("#")) if base else reference
        fragment = unquote(local.removeprefix("#"))
        if local not in ("", "#") and not local.startswith("#"):
            raise UnenforceableError(f"'$ref': {reference!r} is outside of the schema: copy it into $defs")
        found: Any = self._root if fragment == "" else self._anchors.get(fragment)
        if fragment.startswith("/"):
            found = self._root
            for name in fragment[1:].split("/"):
                name = name.replace("~1", "/").replace("~0", "~")
                try:
                    found = found[int(name)] if isinstance(found, list) and name.isdigit() else found[name]
                except (LookupError, TypeError):
                    found = None
        if not isinstance(found, (dict, bool)):
            raise UnenforceableError(f"'$ref': {reference!r} refers to nothing")
        return found

    def _index(self, schema: Any, is_root: bool = True) -> None:
        """Collects the anchors below a schema."""
        if isinstance(schema, list):
            for each in schema:
                self._index(each, False)
        if not isinstance(schema, dict):
            return
        if "$id" in schema and not is_root:
            raise UnenforceableError(
                f"'$id': {schema['$id']!r} below the root is not supported: refer by $anchor or path"
            )
        if "$anchor" in schema:
            self._anchors[schema["$anchor"]] = schema
        for keyword, value in schema.items():
            if keyword in ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"):
                self._index(list(value.values()), False)
            elif keyword not in ("enum", "const", "default", "examples"):
                self._index(value, False)


def kinds(part: Part) -> list[str]:
    """Returns the types of the values that a part allows. Without `type`, its keywords say which are meant."""
    if "type" in part:
        return list(part["type"])
    meant = {kind for keyword in part if (kind := KEYWORDS[keyword][0]) is not None}
    return [kind for kind in TYPES if kind in meant] or [kind for kind in TYPES if kind != "integer"]


def is_closed(part: Part) -> bool:
    """Returns whether an output has only the properties that the schema names: where it names some and no others."""
    return part.get("additionalProperties", not ({"properties", "patternProperties"} & part.keys())) is False


def written(part: Part) -> set[str]:
    """Returns the names that the outputs of a closed part may have."""
    return {*part.get("required", ()), *part.get("properties", ())}


def _plain(schema: dict[str, Any]) -> Part:
    """Returns what is left of a schema without its applicators and annotations. Refuses what cannot be enforced."""
    part: Part = {}
    for keyword, value in schema.items():
        if keyword in _REFUSED and value not in _REFUSED[keyword]:
            raise UnenforceableError(
                f"{keyword!r}: {json.dumps(value)[:80]} cannot be enforced: leave it out, and check the output"
            )
        if keyword in KEYWORDS:
            part[keyword] = int(value) if isinstance(value, float) and value.is_integer() else value
    if "if" in schema and ("then" in schema or "else" in schema):
        raise UnenforceableError("'if' cannot be enforced: write anyOf instead")
    if isinstance(part.get("type"), str):
        part["type"] = [part["type"]]
    if "const" in schema:
        values = [schema["const"]]
        part["enum"] = KEYWORDS["enum"][1](values, part["enum"]) if "enum" in part else values
    return part


def _merge_items(one: Part, other: Part, merged: Part) -> None:
    if not ({"prefixItems", "items"} & one.keys() and {"prefixItems", "items"} & other.keys()):
        return
    prefixes = [part.get("prefixItems", []) for part in (one, other)]
    if any(prefixes):
        merged["prefixItems"] = [
            _both(*(_item(part, index) for part in (one, other))) for index in range(max(map(len, prefixes)))
        ]
        if "items" not in one or "items" not in other:
            merged["items"] = _both(one.get("items", True), other.get("items", True))


def _item(part: Part, index: int) -> Schema:
    prefix = part.get("prefixItems", [])
    return prefix[index] if index < len(prefix) else part.get("items", True)


def _merge_properties(one: Part, other: Part, merged: Part) -> None:
    named = {"properties", "additionalProperties", "patternProperties"}
    if not (named & one.keys() and named & other.keys()):
        return
    if "patternProperties" in one or "patternProperties" in other:
        raise UnenforceableError("'patternProperties' together with properties of another schema is not supported")
    names: Iterable[str] = dict.fromkeys([*one.get("properties", ()), *other.get("properties", ())])
    merged["properties"] = {
        name: _both(
            *(part.get("properties", {}).get(name, part.get("additionalProperties", True)) for part in (one, other))
        )
        for name in names
    }


def matches(pattern: str, name: str) -> bool:
    """Returns whether a pattern matches a part of a property's name."""
    return re.search(pattern, name) is not None
