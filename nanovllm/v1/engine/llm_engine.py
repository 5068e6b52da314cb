"""vLLM's place of `LLMEngine`."""

from nanovllm.engine.llm_engine import LLMEngine as LLMEngine
