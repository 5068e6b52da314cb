"""vLLM's place of `AsyncLLM` and `LLMEngine`."""
