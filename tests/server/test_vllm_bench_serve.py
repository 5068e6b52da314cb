"""The requests of `vllm bench serve`, and how it reads the answers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.running_server import PROMPT, QUESTION, RunningServer

PARTS = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
COMMON = {"model": "tiny", "stream_options": {"include_usage": True}, "ignore_eos": True}
COMPLETION = {"prompt": PROMPT, "repetition_penalty": 1.0, "max_tokens": 16, "logprobs": None}
CHAT = {"messages": PARTS, "max_completion_tokens": 16}


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
def test_a_request_gives_a_text_and_then_its_usage(server: RunningServer, path: str, body: dict[str, Any]) -> None:
    """The server counts as ready when such a request is answered."""
    *chunks, last = server.stream(path, **COMMON, **body)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "85" in "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 16
