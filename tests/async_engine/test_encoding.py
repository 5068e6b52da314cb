"""What crosses to an engine's process and back is what was sent."""

from __future__ import annotations

import contextvars
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm import (
    AsyncLLM,
    EngineDeadError,
    InvalidArgumentError,
    ModelLoadError,
    OutOfMemoryError,
    RequestOutputKind,
    RequestTooLargeError,
    SamplingParams,
    StepFailedError,
    StructuredOutputsParams,
    UnknownArgumentError,
    WorkerError,
)
from nanovllm.async_engine.encoding import VERSION, EngineReady, StartEngine, StopEngine, decode, encode
from nanovllm.async_engine.messages import AddRequest, CompletionEnd, EngineEnded, Logprobs, RequestEnd, StepNews
from nanovllm.config import EngineConfig
from nanovllm.engine.batch import LogitEdits
from nanovllm.engine.sequence import TokenLogprob
from nanovllm.errors import ChannelError
from nanovllm.requests.preparation import PreparedRequest
from nanovllm.requests.stop_search import StopSearch

SCORES = [
    TokenLogprob(-0.1, 1, np.array([4, 5], dtype=np.int32), np.array([-0.1, -2], dtype=np.float32)),
    TokenLogprob(-3.5, 9, np.array([], dtype=np.int32), np.array([], dtype=np.float32)),
]


def assert_equal(found: Any, expected: Any) -> None:
    """As ==, with arrays and contexts."""
    assert type(found) is type(expected) or isinstance(expected, np.ndarray)
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for each, wanted in zip(found, expected, strict=True):
            assert_equal(each, wanted)
    elif hasattr(expected, "__dataclass_fields__"):
        for field in fields(expected):
            assert_equal(getattr(found, field.name), getattr(expected, field.name))
    elif isinstance(expected, StopSearch):
        assert found.order == expected.order
    elif not isinstance(expected, (contextvars.Context, BaseException)):
        assert found == expected


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(stop=["a", "\ud800", "é\n"], stop_token_ids=[5], include_stop_str_in_output=True, n=3),
        SamplingParams(logit_bias={7: -1.5, 0: 2}, bad_words=["no"], logprobs=2, prompt_logprobs=-1, seed=2**62),
        SamplingParams(structured_outputs=StructuredOutputsParams(choice=["aye", "no"])),
        SamplingParams(structured_outputs=StructuredOutputsParams(json={"is": "array"}), max_tokens=None),
        SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, detokenize=False, allowed_token_ids=[1, 2]),
    ],
)
def test_a_request(params: SamplingParams) -> None:
    prepared = PreparedRequest(
        prompt="introduce \ud800 yourself",
        token_ids=np.array([1, 2, 500], dtype=np.int32),
        cache_salt=b"\x00\xff",
        params=params,
        logit_edits=LogitEdits(3, (1.0, 0.5, 0.0), 1, (7, 8), np.array([-1, 5], dtype=np.int32)),
        grammar=params.structured_outputs if isinstance(params.structured_outputs, StructuredOutputsParams) else None,
        stop_search=StopSearch(tuple(params.stop)) if params.stop else None,
    )
    request = AddRequest(7, "r", prepared, 12.5, True, False, contextvars.copy_context())
    assert_equal(decode(encode(request)), request)
    assert decode(encode(request)).prepared.params == params


def test_what_a_step_brought() -> None:
    packed = Logprobs.pack(SCORES)
    assert packed is not None
    end = CompletionEnd(
        token_ids=np.array([4], dtype=np.int32),
        finish_reason="stop",
        stop_reason="x",
        stop_text="text",
        error=None,
        num_cached_tokens=None,
        queued=1.0,
        first_scheduled=2.0,
        first_token=None,
        last_token=None,
        finished=3.0,
        preempted_at=[2.5],
        logprobs=packed,
        prompt_logprobs=None,
    )
    news = StepNews(
        numbers=np.array([3, 9], dtype=np.int64),
        token_ids=np.array([4, 5], dtype=np.int32),
        scored=np.array([0, 1], dtype=np.int32),
        logprobs=packed,
        cached=[(3, 16)],
        ended=[RequestEnd(2, [end])],
    )
    found = decode(encode(news))
    assert_equal(found, news)
    assert_equal(found.logprobs.unpack(), SCORES)


def test_a_configuration() -> None:
    config = EngineConfig("tiny", device="cpu", hf_overrides={"rope": {"is": [1, None]}}, max_num_seqs=3)
    assert decode(encode(StartEngine(config, {"nanovllm": 10}))) == StartEngine(config, {"nanovllm": 10})


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgumentError("device", {"a": [1]}, "a name", "Do this."),
        InvalidArgumentError("top_k", 10**5000, "smaller"),
        InvalidArgumentError("prompt", object(), "a text"),
        RequestTooLargeError("prompt", "9 tokens", "shorter"),
        UnknownArgumentError("LLM", "max_modle_len", ["max_model_len"]),
        ModelLoadError("it is missing"),
        OutOfMemoryError("1 GB"),
        WorkerError(1, "died", "Traceback"),
        EngineDeadError.after(RuntimeError("the device failed")),
        StepFailedError.after(EngineDeadError.after(ValueError("x", 3))),
        FileNotFoundError(2, "No such file", "x"),
    ],
)
def test_an_error(error: BaseException) -> None:
    found = decode(encode(EngineEnded(error))).error
    causes = 0
    while error is not None:
        assert type(found) is type(error)
        assert str(found) == str(error)
        found, error = found.__cause__, error.__cause__  # type: ignore[assignment]
        causes += 1
    assert found is None
    assert causes <= 3


class OfAnotherPackage(Exception):
    def __init__(self, one: int, *, two: int) -> None:
        super().__init__(f"{one} and {two}")


def test_an_error_of_an_unknown_type() -> None:
    found = decode(encode(EngineEnded(OfAnotherPackage(1, two=2)))).error
    assert type(found) is RuntimeError
    assert str(found) == "OfAnotherPackage: 1 and 2"


def test_another_version_is_refused() -> None:
    data = bytearray(encode(StopEngine()))
    data[0] += 1
    with pytest.raises(ChannelError, match=f"version {VERSION + 1}.*reads {VERSION}"):
        decode(bytes(data))


def test_what_cannot_cross() -> None:
    with pytest.raises(InvalidArgumentError, match=r"hf_overrides.*engine_process=False"):
        AsyncLLM("tiny", device="cpu", hf_overrides={"field": object()}, engine_process=True)
    with pytest.raises(TypeError):
        encode(EngineReady(object()))  # type: ignore[arg-type]


def test_a_path() -> None:
    config = EngineConfig("tiny", profiler_config={"torch_profiler_dir": Path("/x")})
    assert decode(encode(StartEngine(config, {}))).config.profiler_config == {"torch_profiler_dir": "/x"}
