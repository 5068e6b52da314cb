"""Finds the end of a JSON object in text that arrives in pieces."""

from __future__ import annotations

import re

_IN_STRING = re.compile(r'[^"\\]*')
_BETWEEN = re.compile(r"[-+.,:\s0-9a-zA-Z]*")
_PAIRS = {"}": "{", "]": "["}


class MalformedJSONError(Exception):
    """The text cannot be JSON from `position` on."""

    def __init__(self, position: int) -> None:
        self.position = position
        super().__init__(position)


class JSONScanner:
    """Follows strings and brackets from the `{` of an object to its `}`.

    It notices what would hide the end of the object, such as brackets that do not match, and no other faults.

    opened: the brackets that are open at the start of the text.
    """

    def __init__(self, opened: str = "") -> None:
        self._opened = list(opened)
        self._in_string = False
        self._escaped = False

    def scan(self, text: str, start: int = 0) -> int | None:
        """Returns the position after the object, or None if it goes on after `text`.

        start: where to go on; each call gets the text that follows. Raises MalformedJSONError.
        """
        position = start
        while position < len(text):
            if self._escaped:
                self._escaped = False
                position += 1
                continue
            match = (_IN_STRING if self._in_string else _BETWEEN).match(text, position)
            assert match is not None  # both patterns match an empty text
            position = match.end()
            if position == len(text):
                break
            self._read(text[position], position)
            position += 1
            if not self._opened:
                return position
        return None

    def _read(self, character: str, position: int) -> None:
        if character == '"':
            self._in_string = not self._in_string
        elif self._in_string:
            self._escaped = True  # a backslash
        elif character in "{[":
            self._opened.append(character)
        elif character not in _PAIRS or self._opened.pop() != _PAIRS[character]:
            raise MalformedJSONError(position)
