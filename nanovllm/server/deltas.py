"""What the streaming parsers turn a model's text into: reasoning, content and tool calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class ReasoningDelta:
    """The next part of the reasoning."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """The next part of the content."""

    text: str


@dataclass(frozen=True)
class ToolCallDelta:
    """The next part of tool call number `index`.

    id, name: set in the first delta of a call, None in the others.
    arguments: the next part of the arguments' JSON text.
    """

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


Delta: TypeAlias = ReasoningDelta | ContentDelta | ToolCallDelta


@dataclass(frozen=True)
class ToolCall:
    """A whole tool call. The model may have written arguments that are not valid JSON."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ParsedMessage:
    """All deltas of a message, joined. A part without text is None."""

    reasoning: str | None
    content: str | None
    tool_calls: tuple[ToolCall, ...]


def joined(deltas: Iterable[Delta]) -> ParsedMessage:
    """Returns the message that the deltas make up."""
    reasoning, content = [], []
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        match delta:
            case ReasoningDelta(text):
                reasoning.append(text)
            case ContentDelta(text):
                content.append(text)
            case ToolCallDelta(index, arguments, str(id), str(name)):
                calls[index] = ToolCall(id, name, arguments)
            case ToolCallDelta(index, arguments):
                begun = calls[index]
                calls[index] = ToolCall(begun.id, begun.name, begun.arguments + arguments)
    return ParsedMessage("".join(reasoning) or None, "".join(content) or None, tuple(calls.values()))
