"""The form of Qwen and Hermes: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, one element a call."""

from __future__ import annotations

from typing import ClassVar

from nanovllm.server.tool_parsers.tool_parser import ToolParser


class HermesToolParser(ToolParser):
    """Reads the calls of Qwen3, Qwen2.5 and Hermes."""

    begin_marker: ClassVar[str] = "<tool_call>"
    end_marker: ClassVar[str] = "</tool_call>"

    def _read_after_call(self) -> bool:
        start = self._after_space(0)
        rest = self._text[start:]
        if rest.startswith(self.end_marker):
            self._text = rest[len(self.end_marker) :]
        elif self.end_marker.startswith(rest):
            if not self._is_whole:
                return False
            self._text = ""  # the end mark is cut off
        self._step = self._read_content
        return True
