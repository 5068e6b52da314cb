"""MessageParser: what a chat endpoint feeds the model's text to."""

from __future__ import annotations

from collections.abc import Iterable

from nanovllm.server.deltas import ContentDelta, Delta, ToolCallDelta
from nanovllm.server.reasoning import ReasoningParser
from nanovllm.server.tool_parsers.tool_parser import ToolParser


class MessageParser:
    """Turns text into reasoning, content and tool calls. Without parsers, all text is content.

    parallel_tool_calls: False keeps the first call alone, as OpenAI's field of that name asks.
    """

    def __init__(
        self,
        reasoning: ReasoningParser | None = None,
        tools: ToolParser | None = None,
        *,
        parallel_tool_calls: bool = True,
    ) -> None:
        self._reasoning, self._tools = reasoning, tools
        self._parallel = parallel_tool_calls
        self.has_tool_calls = False

    def feed(self, text: str) -> list[Delta]:
        """Returns what is known after the next piece of text."""
        if self._reasoning is None:
            return self._with_calls([ContentDelta(text)] if text else [])
        return self._with_calls(self._reasoning.feed(text))

    def finish(self) -> list[Delta]:
        """Returns what waited, at the end of the text."""
        deltas = [] if self._reasoning is None else self._with_calls(self._reasoning.finish())
        return deltas if self._tools is None else deltas + self._kept(self._tools.finish())

    def _with_calls(self, deltas: Iterable[Delta]) -> list[Delta]:
        if self._tools is None:
            return list(deltas)
        found: list[Delta] = []
        for delta in deltas:
            found += self._kept(self._tools.feed(delta.text)) if isinstance(delta, ContentDelta) else [delta]
        return found

    def _kept(self, deltas: list[Delta]) -> list[Delta]:
        kept = [each for each in deltas if self._parallel or not isinstance(each, ToolCallDelta) or each.index == 0]
        self.has_tool_calls |= any(isinstance(each, ToolCallDelta) for each in kept)
        return kept
