"""The arguments of one call, and nothing else: what tool_choice with a function's name makes the model write."""

from __future__ import annotations

from nanovllm.server.tool_parsers.tool_parser import ToolParser


class NamedCallParser(ToolParser):
    """Makes the whole text the arguments of one call of the function `name`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._step = self._read_begin

    def _read_begin(self) -> bool:
        if self._text and not self._num_calls:
            self._announce(self._name)
        self._take_arguments(len(self._text))
        return False

    def _read_after_call(self) -> bool:
        raise AssertionError("the call ends with the text")
