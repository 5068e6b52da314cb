"""What structured outputs ask for is enforced or refused: outputs without a model, checked by jsonschema and re."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from transformers import AutoTokenizer

from nanovllm import InvalidArgumentError, StructuredOutputsParams
from nanovllm.models.checkpoint import resolve_model_folder
from nanovllm.requests.grammar_reader import read_grammar
from tests.properties import examples
from tests.requests.grammar_walks import Walker
from tests.requests.schemas import draw_schema

pytest.importorskip("xgrammar", reason="the extra nanovllm[structured] is not installed")


@pytest.fixture(scope="module")
def walker() -> Walker:
    return Walker(AutoTokenizer.from_pretrained(resolve_model_folder("tiny")))


def outputs(walker: Walker, number: int = 40, **asked: Any) -> set[str]:
    """Returns outputs of a walk through a grammar."""
    compiled, draw = walker.compile(read_grammar(StructuredOutputsParams(**asked))), random.Random(0)
    ended = {text for _ in range(number) if (text := walker.walk(compiled, draw)) is not None}
    assert ended
    return ended


def fits(text: str, schema: Any) -> bool:
    from jsonschema import Draft202012Validator

    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    return bool(validator.is_valid(json.loads(text)))


def refusal(**asked: Any) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        read_grammar(StructuredOutputsParams(**asked))
    assert caught.value.field == f"structured_outputs.{next(iter(asked))}"
    return str(caught.value)


def test_every_output_of_a_drawn_schema_fits_it(walker: Walker) -> None:
    num_enforced = 0
    for seed in range(examples(2400)):
        draw = random.Random(seed)
        schema = draw_schema(draw)
        asked = StructuredOutputsParams(json=schema, disable_any_whitespace=draw.random() < 0.5)
        try:
            compiled = walker.compile(read_grammar(asked))
        except InvalidArgumentError:
            continue
        num_enforced += 1
        for _ in range(4):
            text = walker.walk(compiled, draw)
            assert text is None or fits(text, schema), (seed, json.dumps(schema), text)
    assert num_enforced > examples(2400) // 2


INTEGER, SHORT = {"type": "integer"}, {"type": "string", "maxLength": 2}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": '^a"b$'},
        {"type": "string", "pattern": r"^a\\b$"},
        {"type": "string", "pattern": "^a\nb$"},
        {"type": "string", "pattern": r"^[\s\S]$"},
        {"type": "string", "pattern": "b"},
        {"type": "string", "pattern": "^(a|b$)"},
        {"type": "string", "pattern": "^[a-z]{2,5}$", "maxLength": 8, "minLength": 1},
        {"type": "string", "format": "ipv4", "maxLength": 15},
        {"allOf": [INTEGER], "minimum": 3, "maximum": 5},
        {"allOf": [INTEGER, {"minimum": 3}, {"maximum": 12}]},
        {
            "allOf": [{"properties": {"a": INTEGER}}, {"properties": {"a": {"minimum": 3}, "b": SHORT}}],
            "required": ["a"],
        },
        {"anyOf": [INTEGER, SHORT], "type": "string"},
        {"anyOf": [{"minimum": 5}, {"maximum": 2}], "type": "integer", "minimum": 0, "maximum": 9},
        {"$ref": "#/$defs/n", "maximum": 4, "$defs": {"n": {"type": "integer", "minimum": 0}}},
        {"type": "object", "properties": {"a": INTEGER}, "required": ["a", "b"]},
        {"type": "object", "required": ["b"], "additionalProperties": SHORT},
        {"enum": ["a", 1, 2, None, "abc"], "type": ["integer", "string"], "minimum": 2, "pattern": "b"},
        {"const": {"a": [1, 2.5]}, "type": "object"},
        {"$ref": "#n", "$defs": {"x": {"$anchor": "n", "type": "integer"}}},
        {"$id": "http://here/x.json", "$ref": "http://here/x.json#/$defs/x", "$defs": {"x": INTEGER}},
        {"properties": {"a": INTEGER}, "patternProperties": {"^x-": SHORT}, "required": ["a"]},
        {"type": "object", "properties": {"a": INTEGER}, "additionalProperties": SHORT},
        {"type": "integer", "minimum": 2**64, "maximum": 2**64 + 100},
        {"enum": [2**80, -(2**70)]},
        {"type": "number", "minimum": 0.5, "exclusiveMaximum": 1.25},
        {"type": "integer", "multipleOf": 7},
        {"type": "number", "multipleOf": 3.0, "minimum": -9, "maximum": 9},
        {"oneOf": [INTEGER, {"type": "string"}]},
        {"oneOf": [{"properties": {"k": {"const": k}, k: INTEGER}, "required": ["k"]} for k in ("a", "b")]},
        {"type": "array", "minItems": 2},
        {"type": "array", "prefixItems": [INTEGER], "minItems": 2, "maxItems": 3, "items": SHORT},
        {"type": "object", "minProperties": 1, "maxProperties": 2, "properties": dict.fromkeys("abcd", INTEGER)},
        {"type": "object", "propertyNames": {"pattern": "^[a-c]+$"}, "maxProperties": 3, "minProperties": 1},
        {
            "$ref": "#/$defs/node",
            "$defs": {"node": {"properties": {"next": {"$ref": "#/$defs/node"}}, "type": "object"}},
        },
        {"unevaluatedProperties": False, "allOf": [{"properties": {"a": INTEGER}}], "properties": {"b": SHORT}},
    ],
    ids=json.dumps,
)
def test_what_is_enforced(walker: Walker, schema: Any) -> None:
    for compact in (True, False):
        for text in outputs(walker, json=schema, disable_any_whitespace=compact):
            assert fits(text, schema), text


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "string", "pattern": "(?=a)b"}, "Lookahead is not supported"),
        ({"type": "string", "pattern": r"\bb"}, "word boundary, is not supported"),
        ({"type": "string", "pattern": "a+", "maxLength": 3}, "'pattern' with 'minLength' or 'maxLength'"),
        ({"type": "string", "format": "date", "pattern": "^2"}, "'format' with 'pattern'"),
        ({"type": "string", "format": "iri"}, "'format': 'iri' cannot be enforced"),
        ({"$ref": "http://elsewhere/x.json"}, "'$ref': 'http://elsewhere/x.json' is outside of the schema"),
        ({"$ref": "#/$defs/x"}, "refers to nothing"),
        ({"$ref": "#"}, "refers to itself"),
        ({"properties": {"a": {"$id": "x"}}}, "'$id': 'x' below the root"),
        ({"type": "number", "multipleOf": 0.1}, "'multipleOf': 0.1 cannot be enforced"),
        ({"type": "integer", "multipleOf": 1000}, "'multipleOf': 1000 is enforced up to"),
        ({"properties": {"ab": {}}, "patternProperties": {"a": {}}}, "'patternProperties': 'a' cannot be enforced"),
        ({"oneOf": [{"type": "number"}, INTEGER]}, "'oneOf' whose alternatives may overlap"),
        ({"type": "object", "minProperties": 2}, "'minProperties': 2 cannot be enforced"),
        ({"if": INTEGER, "then": {"minimum": 3}}, "'if' cannot be enforced"),
        ({"dependentRequired": {"a": ["b"]}}, "'dependentRequired': "),
        ({"anyOf": [{"anyOf": [{"not": INTEGER}]}]}, "'not': "),
        ({"type": "string", "enum": [1, 2]}, "no value fits it"),
        ({"allOf": [{"anyOf": [{"minimum": i} for i in range(40)]}] * 4}, "combinations of alternatives"),
    ],
    ids=json.dumps,
)
def test_what_cannot_be_enforced_is_refused_by_name(schema: Any, why: str) -> None:
    assert why in refusal(json=schema)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "string", "minLength": 3.0, "maxLength": 3.0}, '"abc"'),
        ({"type": "integer", "minimum": 0.5, "maximum": 1.5}, "1"),
        ({"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {"const": 1}}}, "1"),
        ({"type": "array", "minItems": 1, "maxItems": 1}, "[1]"),
        ({"const": 1, "dependentRequired": {}, "dependentSchemas": {}, "uniqueItems": False, "not": False}, "1"),
        ({"const": 1, "if": {}, "x-ours": True, "$comment": "ignored"}, "1"),
        ({"const": [1, {"a": "é"}]}, '[1, {"a": "é"}]'),
        (True, "[]"),
    ],
    ids=str,
)
def test_valid_schemas_pass(walker: Walker, schema: Any, text: str) -> None:
    from xgrammar import GrammarMatcher

    asked = StructuredOutputsParams(json=json.dumps(schema), disable_any_whitespace=True)
    matcher = GrammarMatcher(walker.compile(read_grammar(asked)))
    assert matcher.accept_string(text)
    assert matcher.is_completed()


@pytest.mark.parametrize(
    "regex",
    [
        r"\Aab\Z",
        "^(a|b|)$",
        "a.c",
        "[^a-z]",
        r"\S\D",
        r"\W",
        "(?P<x>a)(?:b)",
        "a{2,3}?",
        r"[\^\]\\-]+",
        "é😀|\u2028",
        "(.*.*.*)*",
        "",
    ],
)
def test_every_output_matches_its_regex(walker: Walker, regex: str) -> None:
    for text in outputs(walker, regex=regex):
        assert re.fullmatch(regex, text), text


@pytest.mark.parametrize(
    ("regex", "why"),
    [
        (r"(a)\1", "A reference to a group"),
        ("(?!a)b", "Lookahead"),
        ("(?<=a)b", "lookbehind"),
        ("(?i)a", "Flags"),
        ("(?i:a)", "Flags"),
        ("a^b", "An anchor inside"),
        (r"a\b", "word boundary"),
        (r"\p{L}", "bad escape"),
        ("[", "unterminated character set"),
    ],
)
def test_a_regex_that_no_grammar_can_express_is_refused(regex: str, why: str) -> None:
    assert why in refusal(regex=regex)


def test_javascripts_named_groups_pass(walker: Walker) -> None:
    assert outputs(walker, regex="(?<year>[0-9])x") <= {f"{digit}x" for digit in range(10)}


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        ('start: "a ::= b"', {"a ::= b"}),
        ('start: x\nx: "::="', {"::="}),
        ('# start: "c"\nroot ::= "start: b"', {"start: b"}),
        ('root ::= "(=" [(=]', {"(=(", "(=="}),
        ('start: /a\\/%json/ "%json"', {"a/%json%json"}),
    ],
)
def test_lark_and_ebnf_are_told_apart(walker: Walker, grammar: str, expected: set[str]) -> None:
    assert outputs(walker, grammar=grammar) == expected


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        (r"start: /\Aa\Z/", "Escape sequence '\\A' is not recognized"),
        ("start: /a^b/", "'^' should be at the start"),
        ('start: %json {"type": "string"}', "'%json' is not supported"),
        ('root ::= "a" (="b")', "Lookahead is not supported"),
    ],
)
def test_what_xgrammar_would_ignore_is_refused(grammar: str, why: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert why in refusal(grammar=grammar)
    assert capfd.readouterr().err == ""


def test_an_error_is_short_whatever_it_quotes() -> None:
    assert len(refusal(json={"type": "string", "pattern": "(" * 90 + "x" * 9000})) < 1000
    assert len(refusal(json={"enum": [{"a": "b" * 9000}], "type": "nothing" * 999})) < 1000
    nested = '{"items": ' * 900 + "{}" + "}" * 900
    assert "nested too deep" in refusal(json=nested)
