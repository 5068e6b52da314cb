"""litellm's provider hosted_vllm: a message, a stream, a forced tool call, a text completion."""

from __future__ import annotations

import sys
from typing import Any

import litellm

QUESTION, ANSWER = "What is 27 + 58?", "27 + 58 = 85"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"enum": [{"a": 1}]}}}


def main(url: str) -> None:
    server: Any = {"model": "hosted_vllm/tiny", "api_base": f"{url}/v1", "temperature": 0}
    chat: Any = {**server, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 60}
    message = litellm.completion(**chat)
    assert message.choices[0].message.content == ANSWER, message
    assert message.usage.completion_tokens > 0, message
    chunks = list(litellm.completion(**chat, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER, chunks
    forced = litellm.completion(**chat, tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    calls = forced.choices[0].message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == [("f", '{"a": 1}')], forced
    text = litellm.text_completion(**server, prompt="27 + 58 =", max_tokens=10)
    assert text.choices[0].text.strip() == "85", text


if __name__ == "__main__":
    main(sys.argv[1])
