"""What AsyncLLM chooses where a setting is None, and LLM does not."""

from __future__ import annotations

from nanovllm import LLM, AsyncLLM
from nanovllm.config import EngineConfig


def test_only_for_serving_does_the_target_adapt_and_nothing_is_left_to_the_first_requests() -> None:
    assert EngineConfig("tiny").for_serving().fast_start is False
    assert EngineConfig("tiny", fast_start=True).for_serving().fast_start is True
    for value, expected in ((None, "auto"), (0, None), (20, 20.0)):
        with AsyncLLM("tiny", device="cpu", inter_token_latency_target_ms=value) as engine:
            assert engine.resolved.inter_token_latency_target_ms == expected
    with LLM("tiny", device="cpu") as llm:
        assert llm.llm_engine.resolved.inter_token_latency_target_ms is None
