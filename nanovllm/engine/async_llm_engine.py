"""vLLM's place of `AsyncLLMEngine`."""

from nanovllm.async_llm import AsyncLLM


class AsyncLLMEngine(AsyncLLM):
    """`AsyncLLM` under vLLM's older name."""
