"""vLLM's place of `AsyncLLM`."""

from nanovllm.async_llm import AsyncLLM as AsyncLLM
