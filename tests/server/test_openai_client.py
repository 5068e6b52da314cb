"""openai's own client, unchanged: sync, async, streaming, raw answers, tools and errors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.server.running_server import ANSWER, CONTINUATION, PROMPT, QUESTION, RunningServer, running_server

MESSAGES: Any = QUESTION
CHAT: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 0}
ADD: Any = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"enum": [27, 58]}}}},
}


@pytest.fixture(scope="module")
def guarded() -> Iterator[RunningServer]:
    with running_server(api_key=("key",), max_queue=0) as running:
        yield running


@pytest.fixture(scope="module")
def client(guarded: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="key", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == (ANSWER, "stop", None)
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_as_a_stream(client: openai.OpenAI) -> None:
    text, usage = "", None
    with client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}) as stream:
        for chunk in stream:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
    assert text == ANSWER
    assert usage is not None
    assert usage.prompt_tokens == 33


def test_the_helper_for_streams(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**CHAT) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == ANSWER


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=[PROMPT, PROMPT], temperature=0, logprobs=1)
    assert [choice.text for choice in answer.choices] == [CONTINUATION] * 2
    stream = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == CONTINUATION


def test_raw_answers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(**CHAT, extra_headers={"X-Request-Id": "mine"})
    assert raw.headers["x-request-id"] == raw.request_id == "mine"
    assert raw.parse().choices[0].message.content == ANSWER
    with client.chat.completions.with_streaming_response.create(**CHAT) as streaming:
        assert ANSWER in "".join(streaming.iter_text())


def test_extras_of_vllm(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, extra_body={"allowed_token_ids": [17], "return_token_ids": True}, max_tokens=2
    )
    assert answer.choices[0].text == "22"
    assert answer.choices[0].token_ids == [17, 17]  # type: ignore[attr-defined]


def test_tools(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "add"}}
    answer = client.chat.completions.create(**CHAT, tools=[ADD], tool_choice=choice, max_tokens=60)
    assert answer.choices[0].message.tool_calls is not None
    (call,) = answer.choices[0].message.tool_calls
    assert call.type == "function"
    assert call.function.name == "add"
    with client.chat.completions.stream(**CHAT, tools=[ADD], tool_choice=choice, max_tokens=60) as stream:
        for _ in stream:
            pass
        message: Any = stream.current_completion_snapshot.choices[0].message
    assert message.tool_calls[0].function.arguments == call.function.arguments


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "small"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_errors_have_their_classes(client: openai.OpenAI, guarded: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**{**CHAT, "temperature": 9})
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="a " * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="tiny", prompt="a", n=100)


def test_async(guarded: RunningServer) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{guarded.url}/v1", api_key="key") as client:

            async def whole() -> str:
                return (await client.chat.completions.create(**CHAT)).choices[0].message.content or ""

            async def streamed() -> str:
                stream = await client.chat.completions.create(**CHAT, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(whole(), streamed(), whole(), streamed())

    assert asyncio.run(ask()) == [ANSWER] * 4
