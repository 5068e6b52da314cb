"""Prompts of a large call are queued while the first of them run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from nanovllm import LLM, InvalidArgumentError, RequestOutput
from nanovllm.engine.llm_engine import LLMEngine
from tests.engine.simulated_executor import expected_output
from tests.engine.test_interrupts import llm_with
from tests.engine.test_llm_engine import greedy, is_empty, make_engine, tokens

PROMPTS = [[1 + index, 2, 3, 4] for index in range(20)]
NUM_AHEAD = 4  # of them fit into two steps


@pytest.fixture
def engine() -> LLMEngine:
    return make_engine(max_num_batched_tokens=8, max_num_seqs=4, num_blocks=64)[0]


def generate(llm: LLM, prompts: Sequence[Any]) -> list[RequestOutput]:
    return llm.generate(prompts, greedy(), use_tqdm=False)


def stream(llm: LLM, prompts: Sequence[Any]) -> list[RequestOutput]:
    """Returns the last output of each request, in the order of the prompts."""
    last = {output.request_id: output for output in llm.stream(prompts, greedy())}
    return [last[name] for name in sorted(last, key=lambda name: int(name.removeprefix("generate-")))]


def before_each_step(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch, number: Callable[[], int]) -> list[int]:
    """Returns a list that gets the number before each step."""
    numbers: list[int] = []
    schedule = engine.scheduler.schedule

    def watched() -> Any:
        numbers.append(number())
        return schedule()

    monkeypatch.setattr(engine.scheduler, "schedule", watched)
    return numbers


def lengths_of_the_queue(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that gets the number of unfinished requests before each step."""
    return before_each_step(engine, monkeypatch, lambda: len(engine._unfinished.requests()))


@pytest.mark.parametrize("call", [generate, stream])
def test_only_prompts_for_the_next_steps_are_queued(
    call: Callable[..., list[RequestOutput]], engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = lengths_of_the_queue(engine, monkeypatch)
    outputs = call(llm_with(engine), PROMPTS)
    assert [output.request_id for output in outputs] == [f"generate-{index}" for index in range(20)]
    assert lengths[0] == NUM_AHEAD
    assert max(lengths) <= 4 + 2 * NUM_AHEAD  # rows, and what waits
    if call is generate:
        assert [tokens(output) for output in outputs] == [
            expected_output(prompt, 5, 64, ignore_eos=True) for prompt in PROMPTS
        ]
    assert is_empty(engine)


@pytest.mark.parametrize("call", [generate, stream])
def test_prompts_of_later_steps_are_queued_a_few_at_a_time(
    call: Callable[..., list[RequestOutput]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four rows end in the same step, and one prompt is queued with each step: a sixteenth of what one takes."""
    engine, _ = make_engine(max_num_batched_tokens=64, max_num_seqs=4, num_blocks=64)
    arrivals = before_each_step(engine, monkeypatch, lambda: engine._num_arrivals)
    outputs = call(llm_with(engine), [PROMPTS[index % 20] for index in range(100)])
    assert len(outputs) == arrivals[-1] == 100
    assert arrivals[0] == 32  # those of two steps
    assert max(later - earlier for earlier, later in itertools.pairwise(arrivals)) == 1


def test_requests_of_others_do_not_keep_a_call_from_queueing(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(30):
        engine.add_request(f"other-{index}", [1, 2, 3, 4], greedy())
    lengths = lengths_of_the_queue(engine, monkeypatch)
    generate(llm_with(engine), PROMPTS)
    assert lengths[0] == 30 + NUM_AHEAD


def test_prompts_that_are_mostly_cached_fill_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 24 tokens: two prompts, or 24 that have one block that is not cached."""
    engine, _ = make_engine(max_num_batched_tokens=24, max_num_seqs=512, num_blocks=4096)
    lengths = lengths_of_the_queue(engine, monkeypatch)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, index % 64] for index in range(300)]
    llm_with(engine).generate(prompts, greedy(1), use_tqdm=False)
    assert len(lengths) < 25, "nearly as few steps as if all were queued at once"


@pytest.mark.parametrize("num_objects", [1, 20])
def test_parameters_that_change_meanwhile_do_not_matter(engine: LLMEngine, num_objects: int) -> None:
    params = [greedy(3) for _ in range(num_objects)]
    num_tokens = dict.fromkeys([f"generate-{index}" for index in range(20)], 0)
    for output in llm_with(engine).stream(PROMPTS, params if num_objects == 20 else params[0]):
        num_tokens[output.request_id] += len(output.outputs[0].token_ids)
        for each in params:
            each.max_tokens = 1
    assert set(num_tokens.values()) == {3}


@pytest.mark.parametrize("call", [generate, stream])
def test_a_refused_prompt_among_later_ones(call: Callable[..., list[RequestOutput]], engine: LLMEngine) -> None:
    outputs = call(llm_with(engine), [*PROMPTS[:15], [], *PROMPTS[15:]])
    assert [output.error is None for output in outputs] == [True] * 15 + [False] + [True] * 5
    assert is_empty(engine)


@pytest.mark.parametrize("call", [generate, stream])
def test_nothing_runs_if_all_are_refused(
    call: Callable[..., list[RequestOutput]], engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = lengths_of_the_queue(engine, monkeypatch)
    with pytest.raises(InvalidArgumentError, match="prompt"):
        call(llm_with(engine), [[]] * 20)
    assert not lengths


@pytest.mark.parametrize("call", [generate, stream])
def test_an_id_that_is_taken_ends_the_call_and_leaves_nothing(
    call: Callable[..., list[RequestOutput]], engine: LLMEngine
) -> None:
    engine.add_request("generate-17", [1, 2], greedy(1))
    with pytest.raises(InvalidArgumentError, match="request_id"):
        call(llm_with(engine), PROMPTS)
    engine.drain()
    while engine.has_unfinished_requests():
        engine.step()
    assert is_empty(engine)


def test_all_have_arrived_with_the_call_and_none_is_told_to_wait(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOVLLM_LOG_SLOW_SECONDS", "0.000001")
    engine, _ = make_engine(max_num_batched_tokens=8, max_num_seqs=4, num_blocks=64)
    with caplog.at_level("INFO", "nanovllm"):
        outputs = generate(llm_with(engine), PROMPTS)
    assert len({output.metrics.arrival for output in outputs if output.metrics is not None}) == 1
    assert not [record for record in caplog.records if getattr(record, "fields", {}).get("what") == "queue"]


def test_the_number_of_prompt_tokens_is_told_once_it_is_known(
    engine: LLMEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "nanovllm"):
        generate(llm_with(engine), [*PROMPTS, []])
    texts = [record.getMessage() for record in caplog.records]
    told = [index for index, text in enumerate(texts) if text == "Total prompt tokens: 80"]
    start = texts.index("Starting generation for 21 prompts")
    first_step = next(index for index, text in enumerate(texts) if text.startswith("Scheduled"))
    assert len(told) == 1
    assert start < first_step < told[0]
