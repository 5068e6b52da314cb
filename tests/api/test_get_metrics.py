"""The metrics of LLM and AsyncLLM: the same figures, as vLLM's list and as one snapshot."""

from __future__ import annotations

import asyncio

import pytest

from nanovllm import LLM, AsyncLLM, SamplingParams
from nanovllm.metrics import Counter, Histogram
from tests.processes import WATCHDOG

PROMPT = "count from 3 to 9"
SHORT = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


def test_llm_has_vllm_s_list() -> None:
    with LLM("tiny", device="cpu", max_model_len=128) as llm:
        llm.generate([PROMPT, PROMPT], SHORT, use_tqdm=False)
        metrics = llm.get_metrics()
    assert all(metric.labels["model_name"] == "tiny" for metric in metrics)
    values = {metric.name: metric.value for metric in metrics if isinstance(metric, Counter)}
    assert values["vllm:generation_tokens"] == 6
    counts = {metric.name: metric.count for metric in metrics if isinstance(metric, Histogram)}
    assert (counts["vllm:inter_token_latency_seconds"], counts["vllm:time_to_first_token_seconds"]) == (4, 2)


@pytest.mark.parametrize("in_process", [False, True])
def test_async_llm_has_a_snapshot_at_any_time(in_process: bool) -> None:
    async def use(engine: AsyncLLM) -> None:
        running = engine.generate(PROMPT, SamplingParams(max_tokens=100, ignore_eos=True))
        await anext(running)
        metrics = engine.metrics
        assert (metrics.num_running, metrics.num_waiting) == (1, 0)
        assert 0 < metrics.kv_cache_usage <= 1
        await running.aclose()
        async for _ in engine.generate(PROMPT, SHORT):
            pass

    with AsyncLLM("tiny", device="cpu", max_model_len=128, engine_process=in_process) as engine:
        asyncio.run(asyncio.wait_for(use(engine), WATCHDOG))
        metrics = engine.metrics
    assert dict(metrics.finished) == {"stop": 0, "length": 1, "abort": 1, "error": 0}
    assert (metrics.num_running, metrics.num_waiting) == (0, 0)
    assert engine.metrics == metrics, "also after its end"
