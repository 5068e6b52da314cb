"""Reads the grammar of a request with structured outputs, in about a millisecond. Refuses what cannot be enforced."""

from __future__ import annotations

import json
from typing import Any, TypeAlias

from nanovllm.errors import InvalidArgumentError
from nanovllm.requests.grammar_matcher import grammar_error
from nanovllm.sampling_params import StructuredOutputsParams

Grammar: TypeAlias = Any  # xgrammar.Grammar, not compiled yet

# Keywords of JSON Schema that xgrammar accepts but does not enforce.
_NOT_ENFORCED = {"not", "if", "uniqueItems", "contains", "dependentRequired", "dependentSchemas", "dependencies"}
_NAMED_SCHEMAS = {"properties", "patternProperties", "$defs", "definitions"}  # keys below these are names
_VALUES = {"enum", "const", "default", "examples"}  # what is below these is not a schema


def read_grammar(params: StructuredOutputsParams) -> Grammar:
    """Reads a schema, regex, choice or grammar. Raises InvalidArgumentError if xgrammar cannot enforce it."""
    try:
        from xgrammar import Grammar as Reader
    except ImportError as error:
        hint = f"pip install xgrammar ({error})"
        raise InvalidArgumentError("structured_outputs", params, "None, since xgrammar is missing", hint) from None
    try:
        if params.kind in ("json", "json_object"):
            schema = str(params.json) if params.json else '{"type": "object"}'
            schema = json.dumps(_enforceable(json.loads(schema)))
            return Reader.from_json_schema(schema, any_whitespace=not params.disable_any_whitespace)
        if params.regex is not None:
            return Reader.from_regex(params.regex)
        if params.choice is not None:
            texts = [json.dumps(text, ensure_ascii=False) for text in params.choice]
            return Reader.from_ebnf(f"root ::= {' | '.join(texts)}")
        text = str(params.grammar)
        return Reader.from_ebnf(text) if "::=" in text else Reader.from_lark(text)
    except Exception as error:  # xgrammar raises many kinds
        raise grammar_error(params, error) from None


def _enforceable(schema: Any, names: bool = False) -> Any:
    """Returns an equivalent schema that xgrammar fully enforces. Raises ValueError for keywords that it would ignore.

    names: the keys of `schema` are names of properties or definitions, not keywords.
    """
    if isinstance(schema, list):
        return [_enforceable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if names:
        return {name: _enforceable(item) for name, item in schema.items()}
    ignored = [keyword for keyword in schema if keyword in _NOT_ENFORCED and schema[keyword] is not False]
    if ignored or len(schema.get("allOf", ())) > 1:
        raise ValueError(f"{(ignored or ['allOf'])[0]!r} cannot be enforced")
    bounds = schema.get("minLength", 0), schema.get("maxLength", "")
    schema = {
        keyword: value if keyword in _VALUES else _enforceable(value, keyword in _NAMED_SCHEMAS)
        for keyword, value in schema.items()
        if keyword not in ("minLength", "maxLength")
    }
    if bounds != (0, ""):  # a pattern instead, since xgrammar would allow raw control characters in bounded strings
        if "pattern" in schema:
            raise ValueError("'pattern' with 'minLength' or 'maxLength' cannot be enforced")
        schema["pattern"] = f"^[\\s\\S]{{{bounds[0]},{bounds[1]}}}$"
    return schema
