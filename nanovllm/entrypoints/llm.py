"""vLLM's place of `LLM`."""

from nanovllm.llm import LLM as LLM
