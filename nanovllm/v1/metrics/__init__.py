"""vLLM's place of the metrics that `LLM.get_metrics` returns."""
