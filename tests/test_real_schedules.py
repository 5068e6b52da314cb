"""The same tokens under any schedule, with a real model: what `tests/engine/test_schedules.py` simulates."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm import LLM, LLMEngine, SamplingParams
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.test_oracle import random_prompts

NUM_REQUESTS = 10
COMMON = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]  # a start that some prompts share
PROMPTS = [(COMMON if i % 2 else []) + p for i, p in enumerate(random_prompts(320, seed=3, num_prompts=NUM_REQUESTS))]
PARAMS = [
    SamplingParams(temperature=(0, 0, 0.8)[i % 3], seed=i if i % 2 else None, max_tokens=20 + i, ignore_eos=i != 4)
    for i in range(NUM_REQUESTS)
]
LARGEST = max(len(p) + q.max_tokens for p, q in zip(PROMPTS, PARAMS, strict=True))

drawn_settings = st.fixed_dictionaries(
    {
        "kvcache_block_size": st.sampled_from([4, 8, 16]),
        "max_num_seqs": st.integers(1, NUM_REQUESTS),
        "max_num_batched_tokens": st.integers(NUM_REQUESTS, 100),
        "enable_prefix_caching": st.booleans(),
        "pipeline_depth": st.integers(1, 2),
    }
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"), head_dim=64)


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path) -> list[list[int]]:
    """Each request alone, on an engine with room for all."""
    with LLM(str(checkpoint), skip_tokenizer_init=True, device="cpu", enable_prefix_caching=False) as llm:
        return run(llm.llm_engine, {i: 200 * i for i in range(NUM_REQUESTS)})


def run(engine: LLMEngine, arrivals: dict[int, int]) -> list[list[int]]:
    """Request i arrives at step arrivals[i], in the order of their numbers where those agree."""
    outputs: dict[str, list[int]] = {}
    step = 0
    while len(outputs) < NUM_REQUESTS or engine.has_unfinished_requests():
        for request, arrival in arrivals.items():
            if arrival == step:
                engine.add_request(str(request), PROMPTS[request], PARAMS[request])
        for output in engine.step():
            outputs[output.request_id] = output["token_ids"]
        scheduler = engine.scheduler
        scheduler.block_manager.check_integrity(sequence.block_table for sequence in scheduler.rows.running())
        step += 1
    assert scheduler.block_manager.num_used_blocks == 0
    return [outputs[str(i)] for i in range(NUM_REQUESTS)]


def check_schedule(
    checkpoint: Path, expected: list[list[int]], values: dict[str, int], delays: list[int], spare: int, **device: object
) -> None:
    # Barely room for the largest request. Arrival order fixes the seeds of requests that bring none, so it stays.
    num_blocks = -(-LARGEST // values["kvcache_block_size"]) + spare
    arrivals = {i: sum(delays[: i + 1]) for i in range(NUM_REQUESTS)}
    settings = {"skip_tokenizer_init": True, "num_kvcache_blocks": num_blocks, **values, **device}
    with LLM(str(checkpoint), **settings) as llm:
        assert run(llm.llm_engine, arrivals) == expected


delays = st.lists(st.integers(0, 6), min_size=NUM_REQUESTS, max_size=NUM_REQUESTS)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(drawn_settings, delays, st.integers(0, 8))
def test_on_a_cpu(
    checkpoint: Path, undisturbed: list[list[int]], values: dict[str, int], delays: list[int], spare: int
) -> None:
    check_schedule(checkpoint, undisturbed, values, delays, spare, device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [False, True])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(drawn_settings, delays, st.integers(0, 8))
def test_on_a_gpu(
    checkpoint: Path,
    undisturbed: list[list[int]],
    enforce_eager: bool,
    values: dict[str, int],
    delays: list[int],
    spare: int,
) -> None:
    """Our own kernels in fp32, with graphs and without: the tokens of torch on a CPU."""
    device = {"device": "cuda", "attention_backend": "triton", "enforce_eager": enforce_eager}
    check_schedule(checkpoint, undisturbed, values, delays, spare, **device)
