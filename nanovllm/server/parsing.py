"""Parsers of a model's text: what of it is content, what is reasoning, and what is a tool call.

A parser is a state machine. It gets the text in pieces, as it is generated, and returns what each piece adds to the
message. How the text is split into pieces does not change the message. A parser of reasoning comes first; the content
that it finds goes through the parser of tool calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class ToolCallDelta:
    """What is new in the tool call number `index` of a message. The first delta of a call has its id and name."""

    index: int
    name: str | None = None
    arguments: str = ""  # a part of the JSON text
    id: str | None = None


@dataclass(frozen=True)
class Delta:
    """What is new in a message: one of the three."""

    content: str = ""
    reasoning: str = ""
    tool_call: ToolCallDelta | None = None


class TextParser(Protocol):
    """Turns the text of one completion into the parts of a message."""

    def feed(self, text: str) -> list[Delta]:
        """Returns what `text`, the next piece, adds to the message. Holds back what may begin a tag."""

    def finish(self) -> list[Delta]:
        """Returns what was held back. The text has ended, perhaps in the middle of a tag or a tool call."""


class PlainText:
    """Takes all text as content."""

    def feed(self, text: str) -> list[Delta]:
        return [Delta(content=text)] if text else []

    def finish(self) -> list[Delta]:
        return []


class Chain:
    """Passes the content that `first` finds on to `second`."""

    def __init__(self, first: TextParser, second: TextParser) -> None:
        self._first, self._second = first, second

    def feed(self, text: str) -> list[Delta]:
        return self._pass_on(self._first.feed(text))

    def finish(self) -> list[Delta]:
        return self._pass_on(self._first.finish()) + self._second.finish()

    def _pass_on(self, deltas: Iterable[Delta]) -> list[Delta]:
        passed: list[Delta] = []
        for delta in deltas:
            passed += self._second.feed(delta.content) if delta.content else [delta]
        return passed


@dataclass
class ToolCall:
    """A complete tool call. arguments: JSON text, which the model may have got wrong."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class ParsedMessage:
    """The parts of a message."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def add(self, deltas: Iterable[Delta]) -> None:
        """Adds what is new."""
        for delta in deltas:
            self.content += delta.content
            self.reasoning += delta.reasoning
            if delta.tool_call is not None:
                if delta.tool_call.id is not None and delta.tool_call.name is not None:
                    self.tool_calls.append(ToolCall(delta.tool_call.id, delta.tool_call.name))
                self.tool_calls[-1].arguments += delta.tool_call.arguments


def parse(parser: TextParser, text: str) -> ParsedMessage:
    """Returns the message of a complete text."""
    message = ParsedMessage()
    message.add(parser.feed(text))
    message.add(parser.finish())
    return message
