"""SamplingParams: defaults, what is allowed, and errors that name the field."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest

from nanovllm import InvalidArgumentError, SamplingParams, StructuredOutputsParams, UnknownArgumentError

PENALTIES = ("presence_penalty", "frequency_penalty")
SWITCHES = ("include_stop_str_in_output", "detokenize", "skip_special_tokens", "speculate")


def test_defaults_are_those_of_nano_vllm() -> None:
    assert dataclasses.asdict(SamplingParams()) == {
        "temperature": 1.0,
        "max_tokens": 64,
        "ignore_eos": False,
        "seed": None,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "logprobs": None,
        "stop": None,
        "stop_token_ids": None,
        "include_stop_str_in_output": False,
        "detokenize": True,
        "skip_special_tokens": True,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": None,
        "min_tokens": 0,
        "bad_words": None,
        "allowed_token_ids": None,
        "structured_outputs": None,
        "prompt_logprobs": None,
        "n": 1,
        "speculate": True,
        "output_kind": None,
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", value) for value in (0, 0.0, 1e-9, 2, 2.0)],
        *[("max_tokens", value) for value in (1, 10**9, None)],
        *[("seed", value) for value in (0, 2**63 - 1, None)],
        *[("ignore_eos", value) for value in (True, False)],
        *[("top_k", value) for value in (-1, 0, 1, 10**30)],
        *[("top_p", value) for value in (1e-9, 0.5, 1, 1.0)],
        *[("logprobs", value) for value in (-1, 0, 20, None)],
        *[("min_p", value) for value in (0, 0.0, 0.05, 1)],
        *[("stop", value) for value in (None, ("a",), ("a", "\n\n"))],
        *[("stop_token_ids", value) for value in (None, (0,), (3, 7))],
        *[(name, value) for name in SWITCHES for value in (True, False)],
        *[(name, value) for name in PENALTIES for value in (-2, -0.5, 0, 2.0)],
        *[("repetition_penalty", value) for value in (1e-6, 0.5, 1, 1.3)],
        *[("logit_bias", value) for value in (None, {0: -100}, {3: 1.5, 7: 100})],
        *[("min_tokens", value) for value in (0, 64)],
        *[("bad_words", value) for value in (None, ("a",), ("a", " b c"))],
        *[("allowed_token_ids", value) for value in (None, (0,), (3, 7))],
    ],
)
def test_allowed(field: str, value: object) -> None:
    kwargs: dict[str, Any] = {field: value}
    assert getattr(SamplingParams(**kwargs), field) == value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", value) for value in (-0.1, 2.1, math.nan, math.inf, "1", None, True)],
        *[("max_tokens", value) for value in (0, -1, 1.0, "64", True)],
        *[("seed", value) for value in (-1, 2**63, 0.5, "0", False)],
        *[("ignore_eos", value) for value in (1, None, "yes")],
        *[("top_k", value) for value in (-2, 1.0, "50", None, True)],
        *[("top_p", value) for value in (0, -0.1, 1.01, math.nan, math.inf, "1", None, True)],
        *[("logprobs", value) for value in (-2, 21, 1.0, "5", True)],
        *[("min_p", value) for value in (-0.1, 1.01, math.nan, math.inf, "0", None, False)],
        *[("stop", value) for value in ("", [""], ["a", 1], 3, b"a", {"a": 1})],
        *[("stop_token_ids", value) for value in (3, "3", [-1], [1.0], [True], ["a"])],
        *[(name, value) for name in SWITCHES for value in (1, None, "yes")],
        *[(name, value) for name in PENALTIES for value in (-2.1, 2.1, math.nan, math.inf, "0", None, True)],
        *[("repetition_penalty", value) for value in (0, -1, 1e-7, math.nan, math.inf, "1", None, True)],
        *[("logit_bias", value) for value in ([1], {"1": 2}, {-1: 2}, {1.0: 2}, {1: "2"}, {1: 101}, {1: math.nan})],
        *[("min_tokens", value) for value in (-1, 65, 1.0, None, True)],
        *[("bad_words", value) for value in ("a", [""], [" "], ["a", 1], 3)],
        *[("allowed_token_ids", value) for value in ([], (), 3, "3", [-1], [1.0], [True])],
        *[("structured_outputs", value) for value in ("json", 3, [("regex", "a")], {1: 2})],
    ],
)
def test_refused_with_field_value_and_what_is_allowed(field: str, value: object) -> None:
    kwargs: dict[str, Any] = {field: value}
    with pytest.raises(InvalidArgumentError) as caught:
        SamplingParams(**kwargs)
    assert isinstance(caught.value, ValueError)
    assert caught.value.field == field
    assert f"{field}={value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "truncates"),
    [
        ({}, False),
        ({"top_k": -1}, False),
        ({"top_k": 3}, True),
        ({"top_p": 0.9}, True),
        ({"min_p": 0.1}, True),
        ({"min_p": 0.1, "temperature": 0}, False),  # greedy takes the likeliest anyway
    ],
)
def test_truncates(fields: dict[str, Any], truncates: bool) -> None:
    assert SamplingParams(**fields).truncates is truncates


@pytest.mark.parametrize(
    "fields",
    [
        *[{name: 0.5} for name in (*PENALTIES, "repetition_penalty")],
        *[{"logit_bias": {0: 0}}, {"min_tokens": 1}, {"bad_words": ["a"]}, {"allowed_token_ids": [0]}],
    ],
)
def test_shapes_logits(fields: dict[str, Any]) -> None:
    assert not SamplingParams(logit_bias={}, bad_words=[]).edits_logits
    assert SamplingParams(**fields).edits_logits


def test_what_is_changed_later_changes_nothing() -> None:
    bias, words, allowed = {3: 1}, ["a"], [5]
    params = SamplingParams(logit_bias=bias, bad_words=words, allowed_token_ids=allowed)
    bias[4], words[0] = 2, "b"
    allowed.append(6)
    assert params == SamplingParams(logit_bias={3: 1.0}, bad_words=("a",), allowed_token_ids=(5,))
    assert params != SamplingParams(logit_bias={3: 2.0}, bad_words=("a",), allowed_token_ids=(5,))


def test_min_tokens_have_no_bound_without_max_tokens() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=10**6).min_tokens == 10**6
    with pytest.raises(InvalidArgumentError, match=r"min_tokens=9 .*from 0 to max_tokens. max_tokens is 8."):
        SamplingParams(max_tokens=8, min_tokens=9)


def test_stop_rules_are_kept_as_tuples() -> None:
    ids = [3]
    params = SamplingParams(stop="a", stop_token_ids=ids)
    ids.append(4)
    assert (params.stop, params.stop_token_ids) == (("a",), (3,))
    assert params == SamplingParams(stop=["a"], stop_token_ids=(3,))
    assert SamplingParams(stop=[], stop_token_ids=[]) == SamplingParams()


def test_a_stop_string_needs_text() -> None:
    with pytest.raises(InvalidArgumentError, match="stop=.*None with detokenize=False"):
        SamplingParams(stop="a", detokenize=False)
    assert SamplingParams(stop_token_ids=[1], detokenize=False).stop_token_ids == (1,)


def test_structured_outputs_may_be_a_dictionary() -> None:
    params = SamplingParams(structured_outputs={"regex": "a+"})
    assert params == SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"))
    with pytest.raises(UnknownArgumentError, match="no argument 'regexp'. Did you mean 'regex'"):
        SamplingParams(structured_outputs={"regexp": "a+"})
    with pytest.raises(InvalidArgumentError, match="ignore_eos=True.*False with structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a+"}, ignore_eos=True)
    with pytest.raises(InvalidArgumentError, match=r"allowed_token_ids=\(3,\).*None with structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a+"}, allowed_token_ids=[3])


def test_a_schema_is_kept_as_text_and_choices_as_a_tuple() -> None:
    asked = StructuredOutputsParams(json={"type": "integer"})
    assert (asked.json, asked.kind) == ('{"type": "integer"}', "json")
    assert asked == StructuredOutputsParams(json='{"type": "integer"}')
    assert StructuredOutputsParams(choice=["a", ""]).choice == ("a", "")
    assert pickle.loads(pickle.dumps(asked)) == asked


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("", {}),
        ("", {"json_object": False}),
        ("", {"regex": "a", "choice": ["a"]}),
        ("", {"json": {}, "json_object": True}),
        ("json", {"json": "{"}),
        ("json", {"json": {1, 2}}),
        ("json", {"json": {"type": object}}),
        ("regex", {"regex": 3}),
        ("regex", {"regex": ["a"]}),
        ("choice", {"choice": "yes"}),
        ("choice", {"choice": []}),
        ("choice", {"choice": ["a", 1]}),
        ("grammar", {"grammar": b"root"}),
        ("json_object", {"json_object": 1}),
        ("disable_any_whitespace", {"json_object": True, "disable_any_whitespace": "no"}),
    ],
)
def test_structured_outputs_are_refused_by_name(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        StructuredOutputsParams(**values)
    assert caught.value.field == ("structured_outputs." + field).rstrip(".")


def test_a_typo_is_answered_with_the_nearest_name() -> None:
    make: Any = SamplingParams
    with pytest.raises(UnknownArgumentError, match="no argument 'temprature'. Did you mean 'temperature'"):
        make(temprature=0)


def test_positional_order_is_part_of_the_interface() -> None:
    assert SamplingParams(0.5, 7, True, 3) == SamplingParams(temperature=0.5, max_tokens=7, ignore_eos=True, seed=3)


def test_fields_can_be_assigned_to_and_others_not() -> None:
    params = SamplingParams(temperature=0.5, seed=1)
    params.temperature = 1.0
    assert params == SamplingParams(seed=1)
    with pytest.raises(AttributeError, match="max_token"):
        params.max_token = 5  # type: ignore[attr-defined]  # that it is refused is the point
    with pytest.raises(TypeError, match="unhashable"):
        hash(params)


def test_a_clone_is_checked() -> None:
    params = SamplingParams(logit_bias={1: 2.0})
    params.stop, params.max_tokens = "a", np.uint8(100)
    clone = params.clone()
    assert (clone.stop, clone.max_tokens, type(clone.max_tokens)) == (("a",), 100, int)
    assert isinstance(params.logit_bias, dict)
    params.logit_bias[1] = 3.0
    assert clone.logit_bias == {1: 2.0}
    params.max_tokens, params.min_tokens = 3, 4
    with pytest.raises(InvalidArgumentError, match="min_tokens=4"):
        params.clone()


def test_values_can_be_pickled_and_replaced() -> None:
    params = SamplingParams(temperature=0.5, seed=1)
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, seed=2) == SamplingParams(temperature=0.5, seed=2)
    with pytest.raises(InvalidArgumentError, match="seed"):
        dataclasses.replace(params, seed=-2)
