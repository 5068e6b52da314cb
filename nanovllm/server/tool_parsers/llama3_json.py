"""The form of Llama 3: `{"name": …, "parameters": {…}}`, with or without `<|python_tag|>` before it."""

from __future__ import annotations

from typing import ClassVar

from nanovllm.server.tool_parsers.tool_parser import ToolParser


class Llama3JSONToolParser(ToolParser):
    """Reads the calls of Llama 3.1, 3.2 and 3.3.

    A call begins at the start of the text, after `<|python_tag|>`, or after another call and a `;` or a comma.
    """

    begin_marker: ClassVar[str] = "<|python_tag|>"
    needs_special_tokens: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self._step = self._read_start

    def _read_start(self) -> bool:
        return self._begin_object_or_content(self._after_space(0))

    def _read_after_call(self) -> bool:
        start = self._after_space(0)
        if self._text[start : start + 1] in (";", ","):
            start = self._after_space(start + 1)
        return self._begin_object_or_content(start)

    def _begin_object_or_content(self, start: int) -> bool:
        if start == len(self._text) and not self._is_whole:
            return False
        if self._text.startswith("{", start):
            return self._begin_object(start)
        self._step = self._read_content
        return True
