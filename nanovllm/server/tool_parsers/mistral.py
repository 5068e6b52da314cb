"""The forms of Mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}]`, and `[TOOL_CALLS]name{…}` since version 11."""

from __future__ import annotations

import re
import secrets
import string
from typing import ClassVar

from nanovllm.server.tool_parsers.call_array import CallArrayParser

_NAME = re.compile(r"([\w.-]{1,128})(?:\[CALL_ID\]([a-zA-Z0-9]{1,64}))?(?:\[ARGS\])?\s*(?=\{)")
_PART_OF_NAME = re.compile(r"[\w.-]{0,128}(?:\[[\w\[\]]{0,90})?\s*")
_ID_CHARACTERS = string.ascii_letters + string.digits


class MistralToolParser(CallArrayParser):
    """Reads the calls of Mistral's models: an array of them, or `name{…}`, `name[ARGS]{…}` after each marker."""

    begin_marker: ClassVar[str] = "[TOOL_CALLS]"
    needs_special_tokens: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self._step = self._read_content
        self._is_array = False

    def new_id(self) -> str:
        """Returns nine letters and digits, the only ids that Mistral's chat templates accept."""
        return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(9))

    def _read_begin(self) -> bool:
        start = self._after_space(self._text.index(self.begin_marker) + len(self.begin_marker))
        self._is_array = self._text.startswith("[", start) or start == len(self._text)
        return self._read_array(start) if self._is_array else self._read_name(start)

    def _read_name(self, start: int) -> bool:
        if name := _NAME.match(self._text, start):
            self._announce(name[1], name[2])
            return self._begin_arguments(name.end())
        if _PART_OF_NAME.fullmatch(self._text, start) and not self._is_whole:
            return False
        return self._reject(start)

    def _end_arguments(self) -> bool:
        return super()._end_arguments() if self._is_array else self._end_call(0)

    def _read_after_call(self) -> bool:
        if self._is_array:
            return super()._read_after_call()
        self._step = self._read_content
        return True
