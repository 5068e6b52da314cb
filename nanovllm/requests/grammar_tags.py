"""Structural tags: text in which what stands between certain tags must fit a schema, a regex or a grammar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanovllm.requests.grammar_ebnf import UnenforceableError, without_lookahead
from nanovllm.requests.grammar_json import json_grammar
from nanovllm.requests.grammar_regex import read_regex

_STRUCTURE = ("begin", "schema", "end")
_FIELDS: dict[str, tuple[str, ...]] = {  # of the formats that can be enforced, by type
    "tag": ("begin", "content", "end"),
    "triggered_tags": ("triggers", "tags", "at_least_one", "stop_after_first", "excludes"),
    "tags_with_separator": ("tags", "separator", "at_least_one", "stop_after_first"),
    "json_schema": ("json_schema",),
    "regex": ("pattern",),
    "grammar": ("grammar",),
    "const_string": ("value",),
    "any_text": ("excludes",),
    "sequence": ("elements",),
    "or": ("elements",),
    "optional": ("content",),
    "plus": ("content",),
    "star": ("content",),
    "repeat": ("min", "max", "content"),
}
_DEFAULTS: tuple[Any, ...] = (None, False, [], "json")  # of the other fields, which xgrammar's own models write


def enforced_tag(given: Any, any_whitespace: bool) -> dict[str, Any]:
    """Returns a structural tag for xgrammar, with the grammars of this package in the place of schemas and regexes.

    given: {"format": …} as xgrammar defines it, or the older form {"structures": …, "triggers": …}.
    Raises UnenforceableError, ValueError and `re.error`.
    """
    if not isinstance(given, Mapping) or not given.keys() & {"format", "structures"}:
        raise UnenforceableError("a structural tag has a 'format', or 'structures' and 'triggers'")
    wanted = given["format"] if "format" in given else _of_structures(given)
    return {"type": "structural_tag", "format": _enforced(wanted, any_whitespace)}


def _of_structures(given: Mapping[str, Any]) -> dict[str, Any]:
    structures = given["structures"]
    if not isinstance(structures, list) or not all(
        isinstance(each, Mapping) and each.keys() == set(_STRUCTURE) for each in structures
    ):
        raise UnenforceableError("'structures' is a list of objects with 'begin', 'schema' and 'end'")
    tags = [
        {
            "type": "tag",
            "begin": each["begin"],
            "content": {"type": "json_schema", "json_schema": each["schema"]},
            "end": each["end"],
        }
        for each in structures
    ]
    return {"type": "triggered_tags", "triggers": given.get("triggers"), "tags": tags}


def _enforced(part: Any, any_whitespace: bool) -> Any:
    """Returns a part of a format with grammars that are enforced. xgrammar checks everything else."""
    if isinstance(part, list):
        return [_enforced(each, any_whitespace) for each in part]
    if not isinstance(part, Mapping):
        return part
    kind = part.get("type", "tag")
    if kind not in _FIELDS:
        raise UnenforceableError(f"the type of a format is one of {', '.join(_FIELDS)}")
    fields = {name: value for name, value in part.items() if name != "type"}
    for name in fields.keys() - set(_FIELDS[kind]):
        if fields.pop(name) not in _DEFAULTS:
            raise UnenforceableError(f"a format of type {kind} has the fields {', '.join(_FIELDS[kind])} alone")
    if kind == "json_schema":
        grammar = json_grammar(fields.get("json_schema"), any_whitespace=any_whitespace)
    elif kind == "regex":
        grammar = f"root ::= {read_regex(str(fields.get('pattern'))).expression}"
    elif kind == "grammar":
        grammar = without_lookahead(str(fields.get("grammar")))
    else:
        return {"type": kind, **{name: _enforced(value, any_whitespace) for name, value in fields.items()}}
    return {"type": "grammar", "grammar": grammar}
