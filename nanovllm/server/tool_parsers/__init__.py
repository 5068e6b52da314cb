"""Parsers of tool calls, one file a form. `nanovllm.server.parsers` lists them by name."""
