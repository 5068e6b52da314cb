"""The parsers that `--reasoning-parser` and `--tool-call-parser` choose from, by their names in vLLM."""

from __future__ import annotations

from nanovllm.server.reasoning import ReasoningParser
from nanovllm.server.tool_parsers.hermes import HermesToolParser
from nanovllm.server.tool_parsers.llama3_json import Llama3JSONToolParser
from nanovllm.server.tool_parsers.mistral import MistralToolParser
from nanovllm.server.tool_parsers.tool_parser import ToolParser

# DeepSeek's form is the same, except that its template opens the block.
REASONING_PARSERS: dict[str, type[ReasoningParser]] = {"deepseek_r1": ReasoningParser, "qwen3": ReasoningParser}
TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesToolParser,
    "llama3_json": Llama3JSONToolParser,
    "mistral": MistralToolParser,
}
