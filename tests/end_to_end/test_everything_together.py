"""Every field of SamplingParams in one engine that is short of everything: each request is as it would be alone.

The other suites draw one feature at a time and shake the schedule. Here features meet: on one request, and as
neighbours in one step, over chunks, preemption, shared prefixes, steps in flight, aborted and discarded requests.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import pytest

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.outputs import Logprob
from nanovllm.sampling_params import RequestOutputKind
from tests.engine.test_schedules import check_integrity
from tests.small_llm import assert_empty

pytest.importorskip("xgrammar")

MAX_MODEL_LEN = 96
PROMPTS = ["The cat", "Once upon a time", "1 + 1 = 2, 2 + 2 =", "The cat sat on the mat. " * 4, "Hello, how are you"]
# Beside each field's default, which half the requests keep: what it takes.
VALUES: dict[str, list[Any]] = {
    "temperature": [0.0, 0.7, 1.3],
    "max_tokens": [1, 5, 30, None],
    "ignore_eos": [True],
    "seed": [1, 2**62],
    "top_k": [5, 50],
    "top_p": [0.6, 0.95],
    "min_p": [0.05],
    "logprobs": [0, 3, -1],
    "prompt_logprobs": [0, 2, -1],
    "stop": ["e", ["the", " a"], ["zqx"]],
    "stop_token_ids": [[5, 60], [261, 262, 263, 264]],
    "include_stop_str_in_output": [True],
    "detokenize": [False],
    "speculate": [False],
    "skip_special_tokens": [False],
    "presence_penalty": [1.5, -0.5],
    "frequency_penalty": [0.7],
    "repetition_penalty": [1.3, 0.9],
    "logit_bias": [{10: 5.0, 40: -20.0}],
    "min_tokens": [1, 5],
    "bad_words": [["the", "cat sat"]],
    "allowed_token_ids": [list(range(3, 90))],
    "n": [2, 3],
    "structured_outputs": [{"regex": "[a-z ]{3,20}"}, {"choice": ["yes", "no", "perhaps"]}, {"json_object": True}],
    "output_kind": list(RequestOutputKind),
}


def draw_params(draw: random.Random) -> SamplingParams:
    """With a seed, as what is drawn without one follows the order of arrival."""
    while True:
        asked = {name: draw.choice(values) for name, values in VALUES.items() if draw.random() < 0.3}
        try:
            return SamplingParams(**{"seed": draw.randrange(2**60), "max_tokens": 17, **asked})
        except ValueError:  # fields that exclude each other
            continue


@pytest.fixture(scope="module")
def alone() -> Iterator[LLM]:
    with LLM("tiny", device="cpu", dtype="float32", max_model_len=MAX_MODEL_LEN, enable_prefix_caching=False) as llm:
        yield llm


def assert_close(scores: Sequence[dict[int, Logprob] | None] | None, expected: Any) -> None:
    assert (scores is None) == (expected is None)
    for row, wanted in zip(scores or (), expected or (), strict=True):
        assert (row is None) == (wanted is None)
        if row is None:
            continue
        assert next(iter(row)) == next(iter(wanted))  # its own
        assert len(row) == len(wanted)
        values = [score.logprob for score in row.values()]
        assert values == pytest.approx([score.logprob for score in wanted.values()], abs=1e-3)


def assert_same(output: RequestOutput, expected: RequestOutput) -> None:
    assert output.error is None
    assert_close(output.prompt_logprobs, expected.prompt_logprobs)
    for own, wanted in zip(output.outputs, expected.outputs, strict=True):
        for name in ("index", "token_ids", "text", "finish_reason", "stop_reason"):
            assert getattr(own, name) == getattr(wanted, name)
        assert_close(own.logprobs, wanted.logprobs)
        assert own.cumulative_logprob == pytest.approx(wanted.cumulative_logprob, abs=1e-2)


def assert_begins_as(output: RequestOutput, expected: RequestOutput) -> None:
    """Of an aborted request: each completion has ended by itself, or is the beginning of what it would have been."""
    for own, wanted in zip(output.outputs, expected.outputs, strict=True):
        assert own.token_ids == wanted.token_ids[: len(own.token_ids)]
        assert own.finish_reason in ("abort", wanted.finish_reason)


def test_every_field_is_drawn() -> None:
    assert VALUES.keys() == {field.name for field in fields(SamplingParams)}


def test_each_request_is_as_it_would_be_alone(alone: LLM) -> None:
    assert sum(check_round(alone, seed) for seed in range(6)) > 3  # a few sequences were preempted, too


def check_round(alone: LLM, seed: int) -> int:
    """One engine and its requests, drawn from `seed`. Returns how often a sequence was preempted."""
    draw = random.Random(seed)
    requests = [(draw.choice(PROMPTS), draw_params(draw)) for _ in range(14)]
    arrivals = sorted((draw.randrange(12), index) for index in range(len(requests)))
    aborted = {index: draw.randrange(25) for index in range(len(requests)) if draw.random() < 0.15}
    discarded = {index: draw.randrange(25) for index in range(len(requests)) if draw.random() < 0.15}
    arguments: dict[str, Any] = {
        "kvcache_block_size": draw.choice([4, 8, 16]),
        "max_num_seqs": draw.randrange(3, 9),
        "max_num_batched_tokens": draw.randrange(10, 60),
        "enable_prefix_caching": draw.random() < 0.7,
        "pipeline_depth": draw.choice([1, 2]),
    }
    blocks = -(-MAX_MODEL_LEN // arguments["kvcache_block_size"]) + draw.randrange(3)
    llm = LLM(
        "tiny", device="cpu", dtype="float32", max_model_len=MAX_MODEL_LEN, num_kvcache_blocks=blocks, **arguments
    )
    outputs: dict[str, RequestOutput] = {}
    with llm:
        engine, step = llm.llm_engine, 0
        while step < 25 or engine.has_unfinished_requests():
            for arrival, index in arrivals:
                if arrival == step:
                    engine.add_request(str(index), *requests[index])
            for index in aborted:
                if aborted[index] == step:
                    engine.abort_request(str(index))
            engine.discard_requests([str(index) for index in discarded if discarded[index] == step])
            outputs.update((output.request_id, output) for output in engine.step())
            check_integrity(engine)
            step += 1
            assert step < 3000, "the engine makes no progress"
        assert_empty(llm)
        num_preemptions = engine.statistics.num_preemptions
    for index, (prompt, params) in enumerate(requests):
        output = outputs.get(str(index))
        if output is None:
            assert index in discarded
            continue
        (expected,) = alone.generate([prompt], params, use_tqdm=False)
        (assert_begins_as if index in aborted else assert_same)(output, expected)
    return num_preemptions
