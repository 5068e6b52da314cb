"""Tool parsers, by the names of vLLM's --tool-call-parser."""

from __future__ import annotations

from nanovllm.server.tool_parsers.hermes import HermesToolParser
from nanovllm.server.tool_parsers.llama3_json import Llama3JSONToolParser
from nanovllm.server.tool_parsers.mistral import MistralToolParser
from nanovllm.server.tool_parsers.tool_parser import ToolParser

__all__ = ["TOOL_PARSERS", "ToolParser"]

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesToolParser,
    "llama3_json": Llama3JSONToolParser,
    "mistral": MistralToolParser,
}
