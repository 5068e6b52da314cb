"""The same tokens under any schedule, with a real model: chunks, preemption, shared prefixes, steps in flight.

`tests/engine/test_schedules.py` asks the same of the engine alone, thousands of times faster. Here attention really
reads the pages. Examples are drawn from a fixed seed: among float32 logits a near tie is rare, not impossible.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nanovllm import LLM, SamplingParams
from tests.engine.random_policy import RandomPolicy
from tests.engine.test_schedules import check_integrity
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.properties import examples

MAX_MODEL_LEN = 96
ON_CPU = {"device": "cpu"}
FP8_ON_CPU = {**ON_CPU, "kv_cache_dtype": "fp8"}
ON_GPU = {"device": "cuda", "attention_backend": "triton"}
DETERMINISTIC = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # no shrinking, which takes minutes here; the engine's own suite finds small examples
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    params: SamplingParams
    arrives_at_step: int


def load(folder: Path, **arguments: Any) -> LLM:
    return LLM(str(folder), dtype="float32", skip_tokenizer_init=True, max_model_len=MAX_MODEL_LEN, **arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_checkpoint(
        tmp_path_factory.mktemp("qwen3"), rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )


@pytest.fixture(scope="module")
def roomy(folder: Path) -> Iterator[LLM]:
    """Everything fits and runs at once, from the start: what the answers are compared with."""
    with load(folder, **ON_CPU, max_num_seqs=32, enable_prefix_caching=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def roomy_fp8(folder: Path) -> Iterator[LLM]:
    with load(folder, **FP8_ON_CPU, max_num_seqs=32, enable_prefix_caching=False) as llm:
        yield llm


def answers(llm: LLM, requests: list[Request]) -> list[list[int]]:
    prompts, params = [r.prompt for r in requests], [r.params for r in requests]
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


def answers_as_they_arrive(llm: LLM, requests: list[Request]) -> list[list[int]]:
    """The same, each request added at its step, with the integrity check after every step."""
    engine = llm.llm_engine
    outputs: dict[str, list[int]] = {}
    step = 0
    while len(outputs) < len(requests) or engine.has_unfinished_requests():
        for index, request in enumerate(requests):
            if request.arrives_at_step == step:
                engine.add_request(str(index), request.prompt, request.params)
        outputs.update((output.request_id, output["token_ids"]) for output in engine.step())
        check_integrity(engine)
        step += 1
        assert step < 5000, "the engine makes no progress"
    assert engine.scheduler.block_manager.num_used_blocks == 0
    return [outputs[str(index)] for index in range(len(requests))]


# A common start makes prefixes shared; tokens stay clear of the end-of-sequence ids 1 and 2.
prompts = st.builds(
    lambda common, own: [*range(10, 10 + common), *own],
    st.integers(0, 40),
    st.lists(st.integers(3, 319), min_size=1, max_size=20),
)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 0, 0, 20]),
    top_p=st.sampled_from([1.0, 1.0, 1.0, 0.7]),
    min_p=st.sampled_from([0.0, 0.0, 0.0, 0.1]),
    seed=st.integers(0, 2**63 - 1),
    max_tokens=st.integers(1, 30),
    ignore_eos=st.booleans(),
)
rounds = st.lists(
    st.lists(st.builds(Request, prompts, params, st.integers(0, 12)), min_size=2, max_size=8), min_size=1, max_size=3
)


def engine_arguments(block_sizes: list[int]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "kvcache_block_size": st.sampled_from(block_sizes),
            "max_num_seqs": st.integers(2, 8),
            "max_num_batched_tokens": st.integers(8, 64),
            "enable_prefix_caching": st.booleans(),
            "pipeline_depth": st.integers(1, 2),
            "max_prefill_tokens_beside_decode": st.none() | st.integers(1, 16),
            "policy_seed": st.none() | st.integers(0, 2**32),
        }
    )


def check(folder: Path, roomy: LLM, where: dict[str, Any], arguments: dict[str, Any], spare: int, drawn: Any) -> None:
    """One engine, with room for the largest request and `spare` blocks more, answers all rounds like the roomy one."""
    largest = max(len(r.prompt) + (r.params.max_tokens or 0) for requests in drawn for r in requests)
    num_blocks = -(-largest // arguments["kvcache_block_size"]) + spare
    seed = arguments.pop("policy_seed")
    with load(folder, **where, **arguments, num_kvcache_blocks=num_blocks) as llm:
        if seed is not None:
            llm.llm_engine.scheduler.policy = RandomPolicy(llm.llm_engine.resolved, seed)
        for requests in drawn:
            assert answers_as_they_arrive(llm, requests) == answers(roomy, requests)


@settings(DETERMINISTIC, max_examples=examples(15))
@given(arguments=engine_arguments([1, 2, 3, 8, 16, 32]), spare=st.integers(0, 4), drawn=rounds)
def test_the_same_tokens_under_any_schedule(
    folder: Path, roomy: LLM, arguments: dict[str, Any], spare: int, drawn: list[list[Request]]
) -> None:
    check(folder, roomy, ON_CPU, arguments, spare, drawn)


@settings(DETERMINISTIC, max_examples=examples(10))
@given(arguments=engine_arguments([1, 3, 16]), spare=st.integers(0, 4), drawn=rounds)
def test_the_same_tokens_under_any_schedule_with_an_fp8_cache(
    folder: Path, roomy_fp8: LLM, arguments: dict[str, Any], spare: int, drawn: list[list[Request]]
) -> None:
    """What is stored of a token depends on that token alone, so it does not matter who stored it, and when."""
    check(folder, roomy_fp8, FP8_ON_CPU, arguments, spare, drawn)


@pytest.mark.parametrize("pipeline_depth", [1, 2])
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_a_cache_too_small_for_all_preempts_and_gives_the_same(
    folder: Path, roomy: LLM, enable_prefix_caching: bool, pipeline_depth: int
) -> None:
    """As above, where it is certain that sequences lose their blocks, also in the middle of their prompt."""
    start = list(range(10, 40))
    requests = [
        Request(
            start[: 3 * i] + [50 + i] * 5, SamplingParams(temperature=i % 2, seed=i, max_tokens=40, ignore_eos=True), i
        )
        for i in range(8)
    ]
    arguments = {"enable_prefix_caching": enable_prefix_caching, "pipeline_depth": pipeline_depth}
    sizes = {"kvcache_block_size": 4, "num_kvcache_blocks": 24, "max_num_seqs": 8, "max_num_batched_tokens": 10}
    with load(folder, **ON_CPU, **sizes, **arguments) as llm:
        assert answers_as_they_arrive(llm, requests) == answers(roomy, requests)
        assert llm.llm_engine.statistics.num_preemptions >= 5
        assert answers_as_they_arrive(llm, requests) == answers(roomy, requests)  # now with what is left in the cache


def test_a_conversation_goes_on_from_what_was_generated(folder: Path, roomy: LLM) -> None:
    """Blocks that decoding filled are shared by the prompt that repeats them, and hold what a prefill would write."""
    first = [Request([50 + i] * 7, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True), 0) for i in range(4)]
    with load(folder, **ON_CPU, kvcache_block_size=8, num_kvcache_blocks=100, max_num_seqs=4) as llm:
        prompts = [r.prompt + output + [9] for r, output in zip(first, answers(llm, first), strict=True)]
        outputs = llm.generate(prompts, [r.params for r in first], use_tqdm=False)
        assert [output.num_cached_tokens for output in outputs] == [32] * 4  # 36 of 38 were computed: four full blocks
        follow_ups = [Request(prompt, r.params, 0) for prompt, r in zip(prompts, first, strict=True)]
        assert [output["token_ids"] for output in outputs] == answers(roomy, follow_ups)


# ---- on a GPU: our own kernels, with CUDA graphs and without, against torch on the CPU


@pytest.mark.gpu
@settings(DETERMINISTIC, max_examples=4)
@given(arguments=engine_arguments([16, 32]), spare=st.integers(0, 4), drawn=rounds)
def test_an_fp8_cache_gives_the_tokens_of_the_cpu_under_any_schedule(
    folder: Path, roomy_fp8: LLM, arguments: dict[str, Any], spare: int, drawn: list[list[Request]]
) -> None:
    check(folder, roomy_fp8, {**ON_GPU, "kv_cache_dtype": "fp8"}, arguments, spare, drawn)


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [False, True])
@settings(DETERMINISTIC, max_examples=8)
@given(arguments=engine_arguments([16, 32]), spare=st.integers(0, 4), drawn=rounds)
def test_graphs_give_the_tokens_of_eager_under_any_schedule(
    folder: Path, roomy: LLM, enforce_eager: bool, arguments: dict[str, Any], spare: int, drawn: list[list[Request]]
) -> None:
    check(folder, roomy, {**ON_GPU, "enforce_eager": enforce_eager}, arguments, spare, drawn)
