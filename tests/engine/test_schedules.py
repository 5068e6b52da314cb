"""The same tokens under any schedule, and no block lost, over random engines and arrivals."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm import LLMEngine, SamplingParams
from nanovllm.config import EngineConfig
from tests.engine.random_policy import RandomPolicy
from tests.engine.simulated_executor import VOCAB_SIZE, SimulatedExecutor, expected_output, make_config
from tests.properties import examples


def make_engine(**changes: object) -> LLMEngine:
    executor = SimulatedExecutor(make_config(**changes))
    return LLMEngine(EngineConfig("simulated", skip_tokenizer_init=True), lambda config, stopwatch: executor)


def check_integrity(engine: LLMEngine) -> None:
    scheduler = engine.scheduler
    scheduler.block_manager.check_integrity(s.block_table for s in scheduler.rows.running())
    assert all(not s.block_table.blocks for s in scheduler.waiting)


@dataclass
class Request:
    prompt: list[int]
    params: SamplingParams
    arrives_at_step: int
    aborted_at_step: int | None = None
    output: list[int] | None = field(default=None, init=False)
    finish_reason: str | None = field(default=None, init=False)


def run(engine: LLMEngine, requests: list[Request]) -> None:
    """Feeds requests in at their steps until all are done, with the integrity check after every step."""
    by_id = {str(index): request for index, request in enumerate(requests)}
    step = 0
    while any(r.arrives_at_step >= step for r in requests) or engine.has_unfinished_requests():
        for request_id, request in by_id.items():
            if request.arrives_at_step == step:
                engine.add_request(request_id, request.prompt, request.params)
            if request.aborted_at_step == step:
                engine.abort_request(request_id)
        for output in engine.step():
            by_id[output.request_id].output = output["token_ids"]
            by_id[output.request_id].finish_reason = output.outputs[0].finish_reason
        check_integrity(engine)
        step += 1
        assert step < 5000, "the engine makes no progress"


engines = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([1, 2, 4, 8]),
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.integers(6, 40),
        "enable_prefix_caching": st.booleans(),
        "pipeline_depth": st.integers(1, 3),
        "max_prefill_tokens_beside_decode": st.none() | st.integers(1, 8),
    }
)
# Few distinct tokens and a common start, so that prefixes are shared often.
prompts = st.builds(
    lambda common, own: [1, 2, 3, 1, 2, 3, 1, 2, 3][:common] + own,
    st.integers(0, 9),
    st.lists(st.integers(1, 3), min_size=1, max_size=20),
)
requests = st.builds(
    Request,
    prompts,
    st.builds(SamplingParams, max_tokens=st.integers(1, 30), ignore_eos=st.booleans()),
    arrives_at_step=st.integers(0, 20),
    aborted_at_step=st.none() | st.integers(0, 40),
)


def check_output(request: Request, expected: list[int]) -> None:
    """An aborted request has a beginning of what it would have had."""
    assert request.output is not None
    if request.finish_reason == "abort":
        assert request.output == expected[: len(request.output)]
        assert request.aborted_at_step is not None
    else:
        assert request.output == expected


def cache_sizes(block_size: int, wanted: list[Request], spare_blocks: int) -> dict[str, int]:
    """Returns the settings of a cache. Without spare blocks it just holds the largest request: most runs preempt."""
    largest = max(len(r.prompt) + (r.params.max_tokens or 0) for r in wanted)
    num_blocks = -(-largest // block_size) + spare_blocks
    return {"num_blocks": num_blocks, "max_model_len": min(64, num_blocks * block_size)}


def check_answers(engine: LLMEngine, wanted: list[Request], policy_seed: int | None) -> None:
    """Runs requests, which get the tokens that they should and leave no block behind. policy_seed: None: no policy."""
    if policy_seed is not None:
        engine.scheduler.policy = RandomPolicy(engine.resolved, policy_seed)
    run(engine, wanted)
    for request in wanted:
        max_tokens, ignore_eos = request.params.max_tokens or 0, request.params.ignore_eos
        check_output(
            request, expected_output(request.prompt, max_tokens, engine.resolved.max_model_len, ignore_eos=ignore_eos)
        )
    assert engine.scheduler.block_manager.num_free_blocks == engine.resolved.num_blocks
    assert engine.scheduler.rows.is_empty


@settings(max_examples=examples(400), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(engines, st.lists(requests, min_size=1, max_size=12), st.integers(0, 20), st.none() | st.integers(0, 2**32))
def test_answers_do_not_depend_on_the_schedule(
    engine_values: dict[str, int], wanted: list[Request], spare_blocks: int, policy_seed: int | None
) -> None:
    engine = make_engine(**engine_values, **cache_sizes(engine_values["block_size"], wanted, spare_blocks))
    check_answers(engine, wanted, policy_seed)


@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_small_cache_preempts_and_still_answers(pipeline_depth: int) -> None:
    engine = make_engine(num_blocks=10, pipeline_depth=pipeline_depth)
    wanted = [Request([1 + i, 2, 3], SamplingParams(max_tokens=30, ignore_eos=True), 0) for i in range(4)]
    run(engine, wanted)
    assert engine.statistics.num_preemptions > 0
    for request in wanted:
        assert request.output == expected_output(request.prompt, 30, 64, ignore_eos=True)


def test_no_request_starves() -> None:
    """A large request waits behind nobody who came later, however many small ones keep coming."""
    engine = make_engine(num_blocks=12, max_num_seqs=3)
    large = Request([1] * 30, SamplingParams(max_tokens=10, ignore_eos=True), 1)
    small = [Request([2 + i % 3] * 5, SamplingParams(max_tokens=6, ignore_eos=True), i // 2) for i in range(60)]
    order: list[int] = []
    by_id = {str(i): r for i, r in enumerate([*small[:4], large, *small[4:]])}
    for request_id, request in by_id.items():
        engine.add_request(request_id, request.prompt, request.params)
    while engine.has_unfinished_requests():
        order += [int(output.request_id) for output in engine.step()]
    assert order.index(4) <= 8


def test_prefix_hits_within_one_batch_in_order() -> None:
    """The second of two equal prompts shares the blocks that the first one is about to write in the same step."""
    engine = make_engine(max_num_batched_tokens=64)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    requests = [Request(prompt, SamplingParams(max_tokens=2, ignore_eos=True), 0) for _ in range(2)]
    run(engine, requests)
    executor = engine.executor
    assert isinstance(executor, SimulatedExecutor)
    assert executor.num_tokens_computed == len(prompt) + (len(prompt) - 8) + 2
    assert requests[0].output == requests[1].output == expected_output(prompt, 2, 64, ignore_eos=True)


def test_a_stopped_sequence_with_a_step_in_flight_gives_no_token_too_many() -> None:
    engine = make_engine(pipeline_depth=2, num_blocks=64, max_num_seqs=6)
    wanted = [Request([t], SamplingParams(max_tokens=60), 0) for t in range(VOCAB_SIZE - 44)]
    run(engine, wanted)
    for request in wanted:
        assert request.output == expected_output(request.prompt, 60, 64)
    assert any(r.finish_reason == "stop" for r in wanted), "no sequence ended early: the test shows nothing"
