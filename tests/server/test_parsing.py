"""How a server's parsers are chosen and put together, with parsers of a simple form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from nanovllm.server.parsing import Chain, Delta, ParsedMessage, PlainText, ToolCall, ToolCallDelta, parse
from nanovllm.server.settings import ServerSettings
from tests.server.running_server import ANSWER, QUESTION, RunningServer, running_server


class UpTo:
    """Takes the text up to a mark as reasoning."""

    def __init__(self, mark: str) -> None:
        self._mark, self._is_before = mark, True

    def feed(self, text: str) -> list[Delta]:
        if not self._is_before:
            return [Delta(content=text)]
        before, mark, after = text.partition(self._mark)
        self._is_before = not mark
        return [Delta(reasoning=before)] * bool(before) + [Delta(content=after)] * bool(after)

    def finish(self) -> list[Delta]:
        return []


class Words:
    """Makes a tool call of each piece of text."""

    def __init__(self) -> None:
        self._index = -1

    def feed(self, text: str) -> list[Delta]:
        self._index += 1
        return [
            Delta(tool_call=ToolCallDelta(self._index, "say")),
            Delta(tool_call=ToolCallDelta(self._index, None, text)),
        ]

    def finish(self) -> list[Delta]:
        return []


@pytest.fixture
def parsing(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    monkeypatch.setattr("nanovllm.server.chat.REASONING_PARSERS", {"equals": lambda prompt: UpTo("=")})
    monkeypatch.setattr("nanovllm.server.chat.TOOL_PARSERS", {"words": lambda tools: Words()})
    with running_server(server.engine, enable_auto_tool_choice=True) as running:
        settings = running.service.settings
        object.__setattr__(settings, "reasoning_parser", "equals")  # names that no release knows
        object.__setattr__(settings, "tool_call_parser", "words")
        yield running


TOOLS = [{"type": "function", "function": {"name": "say"}}]


def test_parsers_are_put_together() -> None:
    message = parse(Chain(UpTo("|"), PlainText()), "ab|cd")
    assert message == ParsedMessage(content="cd", reasoning="ab")
    called = parse(Chain(UpTo("|"), Words()), "ab|cd")
    assert called.tool_calls == [ToolCall("say", "cd")]


def test_reasoning_and_tool_calls_have_fields_of_their_own(parsing: RunningServer) -> None:
    message = parsing.chat()["choices"][0]["message"]
    assert (message["reasoning"], message["reasoning_content"], message["content"]) == ("27 + 58 ", "27 + 58 ", " 85")
    choice = parsing.chat(tools=TOOLS, logprobs=True)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"], choice["finish_reason"]) == ({"name": "say", "arguments": " 85"}, "tool_calls")
    assert len(choice["logprobs"]["content"]) == 13
    assert choice["message"]["reasoning"] == "27 + 58 "


def test_a_stream_of_reasoning_and_tool_calls(parsing: RunningServer) -> None:
    deltas = [
        chunk["choices"][0]["delta"]
        for chunk in parsing.stream("/v1/chat/completions", messages=QUESTION, tools=TOOLS, parallel_tool_calls=False)
    ]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "27 + 58 "
    assert all(delta.get("reasoning") == delta.get("reasoning_content") for delta in deltas)
    calls: list[Any] = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 0]
    assert calls[0]["id"]
    assert "id" not in calls[1]


def test_what_is_asked_for_in_a_form_is_not_parsed(parsing: RunningServer) -> None:
    wanted = {"choice": ["a=b"]}
    assert parsing.chat(structured_outputs=wanted)["choices"][0]["message"]["content"] == "a=b"


def test_reasoning_may_be_left_out(parsing: RunningServer) -> None:
    message = parsing.chat(include_reasoning=False)["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == (None, " 85")


def test_without_parsers_all_is_content(server: RunningServer) -> None:
    assert ServerSettings().reasoning_parser is None
    assert server.chat()["choices"][0]["message"]["content"] == ANSWER
