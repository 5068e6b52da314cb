"""Calls in a JSON array: `[{"name": …, "arguments": {…}}, …]`."""

from __future__ import annotations

import json
import re

from nanovllm.server.parsing import Delta
from nanovllm.server.tool_parsers.tool_parser import ToolParser

_NAME = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")')


class CallArrayParser(ToolParser):
    """Reads an array of calls at the start of the text."""

    def __init__(self) -> None:
        super().__init__()
        self._step = self._read_begin

    def _read_begin(self) -> bool:
        return self._read_array(self._after_space(0))

    def _read_array(self, start: int) -> bool:
        """Reads the beginning of an array at `start`."""
        first = self._after_space(start + 1)
        if not self._text.startswith("[", start) and start < len(self._text):
            return self._reject(start)
        if first >= len(self._text):
            return self._is_whole and self._reject(len(self._text))
        return self._begin_object(first) if self._text[first] == "{" else self._reject(first)

    def _read_after_call(self) -> bool:
        start = self._after_space(0)
        separator = self._text[start : start + 1]
        following = self._after_space(start + 1)
        if separator == "]":
            self._text = self._text[start + 1 :]
        elif separator in ("", ",") and following >= len(self._text) and not self._is_whole:
            return False
        elif separator == "," and self._text.startswith("{", following):
            return self._begin_object(following)
        self._step = self._read_content
        return True


class RequiredCallsParser(CallArrayParser):
    """Reads what tool_choice="required" makes the model write, up to where max_tokens has cut it off.

    The last call then has the arguments that are there, or none after its name. Nothing of it is content.
    """

    def finish(self) -> list[Delta]:
        if self._step == self._read_object and (begun := _NAME.match(self._text, self._object_start)):
            self._announce(json.loads(begun[1]))
        if self._step in (self._read_begin, self._read_object, self._read_after_call):
            self._text = ""
        return super().finish()
