"""vLLM's place of `LLM`."""
