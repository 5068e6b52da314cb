"""What runs nanovllm inside other systems."""
