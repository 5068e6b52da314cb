"""Names at the places where vLLM's scripts import them from: `nanovllm.v1.engine`."""
