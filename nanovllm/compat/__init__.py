"""vLLM's interface where it is larger than ours: arguments without effect, and what is not supported."""
