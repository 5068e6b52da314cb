"""ToolParser: what the parsers of all forms share. Each form is a file of its own."""

from __future__ import annotations

import json
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeGuard

from nanovllm.server.markers import start_of_partial
from nanovllm.server.parsing import Delta, ToolCallDelta
from nanovllm.server.tool_parsers.json_scanner import JSONScanner, MalformedJSONError

_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL)
_FIRST_KEY = re.compile(r'\{\s*"([^"\\]*)"')
_SPACE = re.compile(r"\s*")
_KEYS = {"arguments", "function", "id", "name", "parameters", "type"}

# A step of the parser: reads from `_text`, and returns whether the next step can go on with what is left.
_Step = Callable[[], bool]


class ToolParser(ABC):
    """Turns text into content and tool calls. Any split of the text into pieces gives the same messages.

    A call is announced, with its id and name, when its arguments begin, and they go out as they come, as the model
    wrote them. What does not become a call is content, markers included. White space next to a call is dropped.
    A fault after the announcement stays in the arguments, up to the call's end mark.
    """

    # The marker before a call, and the one after it where the form has one.
    begin_marker: ClassVar[str] = ""
    end_marker: ClassVar[str] = ""
    # Whether the marker is a special token, so that the text must be decoded with skip_special_tokens=False.
    needs_special_tokens: ClassVar[bool] = False

    def __init__(self) -> None:
        self._text = ""  # not given out yet
        self._is_whole = False  # no more text comes
        self._deltas: list[Delta] = []
        self._num_calls = 0
        self._follows_call = False  # nothing but white space since the last call
        self._step: _Step = self._read_content
        # Of the call that is read: where its object begins in `_text`, and what has been scanned of it.
        self._object_start = self._num_scanned = 0
        self._scanner = JSONScanner()

    def feed(self, text: str) -> list[Delta]:
        """Returns what is known after the next piece of text. Only what may be part of a marker or a call waits."""
        self._text += text
        while self._step():
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    def finish(self) -> list[Delta]:
        """Returns what waited, at the end of the text."""
        self._is_whole = True
        return self.feed("")

    # What the forms differ in

    def _read_begin(self) -> bool:
        """The step after the begin marker, which is at the start of `_text`, with white space before it."""
        start = self._after_space(self._text.index(self.begin_marker) + len(self.begin_marker))
        if start == len(self._text):
            return self._is_whole and self._reject(start)
        return self._begin_object(start) if self._text[start] == "{" else self._reject(start)

    @abstractmethod
    def _read_after_call(self) -> bool:
        """The step after a call's object."""

    def new_id(self) -> str:
        """Returns the id of a new call."""
        return f"call_{uuid.uuid4().hex[:24]}"

    # Steps

    def _read_content(self) -> bool:
        at = self._text.find(self.begin_marker) if self.begin_marker else -1
        if at >= 0:
            self._put_content(len(self._text[:at].rstrip()))
            self._step = self._read_begin
            return True
        self._put_content(start_of_partial(self._text, self.begin_marker, None))
        if self._is_whole and not (self._follows_call and self._text.isspace()):
            self._put_content(len(self._text))
        return False

    def _begin_object(self, start: int) -> bool:
        """Goes on with the object that begins at `start` with a `{`."""
        self._object_start = self._num_scanned = start
        self._scanner = JSONScanner()
        self._step = self._read_object
        return True

    def _read_object(self) -> bool:
        """Reads a call's object, up to its arguments if the name comes before them, else whole."""
        text, start = self._text, self._object_start
        if (head := _HEAD.match(text, start)) and _is_name(name := _read_json(head[1])):
            self._announce(name)
            return self._begin_arguments(head.end())
        if (first := _FIRST_KEY.match(text, start)) and first[1] not in _KEYS:
            return self._reject(first.end())
        try:
            end = self._scanner.scan(text, self._num_scanned)
        except MalformedJSONError as error:
            return self._reject(error.position)
        self._num_scanned = len(text)
        if end is not None:
            return self._take_object(end)
        return self._is_whole and self._reject(len(text))

    def _take_object(self, end: int) -> bool:
        call = _read_json(self._text[self._object_start : end])
        if not isinstance(call, dict):
            return self._reject(end)
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
        if not _is_name(name) or not isinstance(arguments, dict):
            return self._reject(end)
        self._announce(name)
        self._put_arguments(json.dumps(arguments))
        return self._end_call(end)

    def _begin_arguments(self, start: int) -> bool:
        self._text = self._text[start:]
        self._scanner = JSONScanner()
        self._step = self._read_arguments
        return True

    def _read_arguments(self) -> bool:
        try:
            end = self._scanner.scan(self._text)
        except MalformedJSONError as error:
            self._take_arguments(error.position)
            self._step = self._read_broken_arguments
            return True
        self._take_arguments(len(self._text) if end is None else end)
        return end is not None and self._end_arguments()

    def _end_arguments(self) -> bool:
        """Goes on after the arguments of a call."""
        self._scanner, self._num_scanned = JSONScanner(opened="{"), 0
        self._step = self._read_rest_of_object
        return True

    def _read_rest_of_object(self) -> bool:
        """Drops what follows the arguments in a call's object, if it is an object."""
        try:
            end = self._scanner.scan(self._text, self._num_scanned)
        except MalformedJSONError:
            return self._end_call(0)
        self._num_scanned = len(self._text)
        if end is not None:
            return self._end_call(end)
        return self._is_whole and self._end_call(0)

    def _read_broken_arguments(self) -> bool:
        """Reads arguments that are not JSON up to the marker behind them."""
        marker = self.end_marker or self.begin_marker
        at = self._text.find(marker) if marker else -1
        if at >= 0:
            self._take_arguments(at)
            return self._end_call(0)
        waiting = len(self._text) if self._is_whole or not marker else start_of_partial(self._text, marker, "")
        self._take_arguments(waiting)
        return False

    def _end_call(self, end: int) -> bool:
        """Drops the text up to `end` and goes on after the call's object."""
        self._text = self._text[end:]
        self._follows_call = True
        self._step = self._read_after_call
        return True

    def _reject(self, end: int) -> bool:
        """Makes content of the text up to `end`, which is no call."""
        self._put_content(end)
        self._step = self._read_content
        return True

    def _after_space(self, start: int) -> int:
        """Returns where the white space that begins at `start` ends."""
        match = _SPACE.match(self._text, start)
        return len(self._text) if match is None else match.end()

    # Deltas

    def _put_content(self, end: int) -> None:
        if end:
            self._deltas.append(Delta(content=self._text[:end]))
            self._text = self._text[end:]
            self._follows_call = False

    def _announce(self, name: str, call_id: str | None = None) -> None:
        self._put_call(ToolCallDelta(self._num_calls, name, id=call_id or self.new_id()))
        self._num_calls += 1

    def _take_arguments(self, end: int) -> None:
        self._put_arguments(self._text[:end])
        self._text = self._text[end:]

    def _put_arguments(self, text: str) -> None:
        if text:
            self._put_call(ToolCallDelta(self._num_calls - 1, arguments=text))

    def _put_call(self, delta: ToolCallDelta) -> None:
        self._deltas.append(Delta(tool_call=delta))


def _read_json(text: str) -> object:
    """Returns the JSON value, or None if the text is not JSON. Line breaks in strings are allowed."""
    try:
        return json.loads(text, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _is_name(value: object) -> TypeGuard[str]:
    """Returns whether the value can name a function: a text without halves of surrogate pairs, which UTF-8 lacks."""
    return isinstance(value, str) and value == value.encode(errors="ignore").decode()
