"""Public values cross processes and are shown: pickle, copy, deepcopy and repr work for every class."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import numpy as np
import pytest

import nanovllm
from nanovllm import (
    AsyncEngineArgs,
    CompletionOutput,
    EngineArgs,
    InvalidArgumentError,
    Logprob,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    RequestTooLargeError,
    SamplingParams,
    StructuredOutputsParams,
    TextPrompt,
    TokensPrompt,
    UnknownArgumentError,
    WorkerError,
)
from nanovllm.config import ALIASES

METRICS = RequestMetrics(
    arrival=1.0,
    queued=1.0,
    first_scheduled=None,
    first_token=None,
    last_token=None,
    finished=2.0,
    num_output_tokens=0,
    num_cached_tokens=0,
    num_preemptions=0,
)
COMPLETION = CompletionOutput(index=0, text="a", token_ids=[1], finish_reason="stop")
OUTPUT = RequestOutput(
    request_id="r",
    prompt="p",
    prompt_token_ids=[2],
    outputs=[COMPLETION],
    finished=True,
    num_cached_tokens=0,
    metrics=METRICS,
)
VALUES: dict[str, Any] = {
    "SamplingParams": SamplingParams(stop=["x"], logit_bias={1: 2.0}, structured_outputs={"regex": "a"}),
    "EngineArgs": EngineArgs("tiny", max_num_seqs=8),
    "AsyncEngineArgs": AsyncEngineArgs("tiny", hf_overrides={"rope_theta": 1.0}),
    "RequestOutputKind": RequestOutputKind.DELTA,
    "TextPrompt": TextPrompt(prompt="a", cache_salt="b"),
    "TokensPrompt": TokensPrompt(prompt_token_ids=[1]),
    "StructuredOutputsParams": StructuredOutputsParams(json={"type": "integer"}),
    "Logprob": Logprob(-0.5, 1, "a"),
    "RequestMetrics": METRICS,
    "CompletionOutput": COMPLETION,
    "RequestOutput": OUTPUT,
    "InvalidArgumentError": InvalidArgumentError("field", 3, "an even number", "Take 4."),
    "RequestTooLargeError": RequestTooLargeError("prompt", "9 tokens", "shorter"),
    "UnknownArgumentError": UnknownArgumentError("LLM", "max_seqs", ["max_num_seqs", "seed"]),
    "WorkerError": WorkerError(1, "died.", "Traceback …"),
}
# Engines hold a device: they are not values.
ENGINES = {"LLM", "AsyncLLM", "AsyncLLMEngine", "LLMEngine"}
PLAIN = sorted(set(nanovllm.__all__) - VALUES.keys() - ENGINES)


@pytest.mark.parametrize("name", [*VALUES, *PLAIN])
@pytest.mark.parametrize("duplicate", [lambda value: pickle.loads(pickle.dumps(value)), copy.copy, copy.deepcopy])
def test_a_value_and_its_duplicate_say_the_same(name: str, duplicate: Any) -> None:
    value = VALUES[name] if name in VALUES else getattr(nanovllm, name)("something happened")
    again = duplicate(value)
    assert type(again) is type(value)
    assert repr(again) == repr(value)
    assert str(again) == str(value)
    if not isinstance(value, Exception):
        assert again == value


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def recursive() -> list[object]:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    return nested


@pytest.mark.parametrize("value", [Unshowable(), recursive(), 10**5000], ids=["raises", "recurses", "is too long"])
def test_an_error_shows_any_value(value: object) -> None:
    assert str(InvalidArgumentError("field", value, "something else")).startswith("field=")


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("top_k", {"top_k": -(10**5000)}),
        ("max_tokens", {"max_tokens": 10**5000, "min_tokens": 10**5001}),
        ("min_tokens", {"min_tokens": 10**5000}),
        ("seed", {"seed": 10**5000}),
        ("logit_bias", {"logit_bias": {10**5000: 1}}),
    ],
)
def test_integers_that_python_refuses_to_print_are_refused_by_name(field: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        SamplingParams(**arguments)
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["top_k", "max_tokens"])
def test_accepted_integers_can_be_printed(field: str) -> None:
    arguments: dict[str, Any] = {field: 10**1000}
    assert str(10**1000) in repr(SamplingParams(**arguments))


@pytest.mark.parametrize("value", [threading.Lock(), lambda: None])
def test_an_error_reaches_another_process_with_any_value(value: object) -> None:
    error = InvalidArgumentError("field", value, "something else", "Take that.")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (InvalidArgumentError, str(error))


@pytest.mark.parametrize(
    ("field", "given", "kept"),
    [
        ("max_tokens", np.uint8(100), 100),
        ("seed", np.uint8(254), 254),
        ("n", np.uint8(2), 2),
        ("top_k", np.int16(7), 7),
        ("min_tokens", np.int8(3), 3),
        ("logprobs", np.int64(5), 5),
        ("temperature", np.float32(0.5), 0.5),
        ("top_p", np.float16(0.5), 0.5),
        ("frequency_penalty", np.float32(0.25), 0.25),
        ("ignore_eos", np.True_, True),
    ],
)
def test_numpy_s_numbers_are_kept_as_python_s(field: str, given: Any, kept: float) -> None:
    """In NumPy's arithmetic 200 + uint8(100) is 44."""
    value = getattr(SamplingParams(**{field: given}), field)
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize(
    ("field", "given", "kept"),
    [
        ("max_num_seqs", np.uint8(100), 100),
        ("num_kvcache_blocks", np.int16(7), 7),
        ("block_size", np.int8(16), 16),
        ("seed", np.uint64(5), 5),
        ("gpu_memory_utilization", np.float16(0.5), 0.5),
        ("step_timeout", np.float32(2), 2.0),
    ],
)
def test_an_engine_s_numbers_are_kept_as_python_s(field: str, given: Any, kept: float) -> None:
    value = getattr(EngineArgs("tiny", **{field: given}), ALIASES.get(field, field))
    assert value == kept
    assert type(value) is type(kept)
