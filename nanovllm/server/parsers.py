"""The parsers that `--reasoning-parser` and `--tool-call-parser` choose from, by their names in vLLM."""

from __future__ import annotations

from nanovllm.server.parsing import ReasoningParsers, ToolParsers

REASONING_PARSERS: ReasoningParsers = {}
TOOL_PARSERS: ToolParsers = {}
